"""batchnorm adapt: weights or a domain of a foreign model, as the library gives them, and what is refused."""

import sys

import numpy as np
import pytest
import safetensors.torch
import torch

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.cli.saved import load_weights
from batchnorm.data import load

MODULE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(144, 10), nn.BatchNorm1d(10))

def batches():
    torch.manual_seed(1)
    return [5 + 2 * torch.randn(20, 1, 28, 28) for _ in range(4)]

def one():
    return [torch.randn(1, 1, 28, 28)]
"""

MODEL = "adapted_models:net"
GIVEN = ["adapt", MODEL, "--data", "adapted_models:batches"]


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "adapted_models", raising=False)
    (tmp_path / "adapted_models.py").write_text(MODULE)
    import adapted_models

    return tmp_path, adapted_models


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("method", ["statistics", "blended", "entropy"])
def test_weights_are_those_of_the_library(foreign, capsys, method, ending):
    folder, module = foreign
    out = folder / f"new.{ending}"
    more = {"statistics": [], "blended": ["--prior", "40"], "entropy": ["--rate", "0.01", "--epochs", "2"]}[
        method
    ]
    assert main([*GIVEN, "--method", method, *more, "--trust", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"adapted 2 layers, method '{method}': 80 examples in 4 batches" in said
    expected = module.net().eval()
    options = (
        {"prior": 40.0} if method == "blended" else {"rate": 0.01, "epochs": 2} if method == "entropy" else {}
    )
    bn.adapt(expected, module.batches(), method=method, trust=True, **options)
    got, _ = load_weights(module.net(), out)
    assert all(torch.equal(t, got.state_dict()[name]) for name, t in expected.state_dict().items())


def test_domains_are_added_to_one_file(foreign, capsys):
    folder, module = foreign
    out = folder / "domains.safetensors"
    for name, method in (("first", "statistics"), ("second", "blended")):
        assert main([*GIVEN, "--trust", "--method", method, "--domain", name, "--out", str(out)]) == 0
    assert "domains.safetensors: source, first, second; " in capsys.readouterr().out
    model, fresh = module.net().eval(), module.net().eval()
    domains = bn.Domains.load(model, out)
    domains.select("second")
    expected = module.net().eval()
    bn.adapt(expected, module.batches(), method="blended", trust=True)
    assert torch.equal(model[1].running_mean, expected[1].running_mean)
    domains.select("source")
    assert all(torch.equal(t, fresh.state_dict()[name]) for name, t in model.state_dict().items())
    before = out.read_bytes()
    assert main([*GIVEN, "--trust", "--domain", "first", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "has a domain 'first' already; --force replaces it. It has 'source', 'first', 'second'" in said
    assert out.read_bytes() == before
    assert (
        main([*GIVEN, "--trust", "--method", "blended", "--domain", "first", "--out", str(out), "--force"])
        == 0
    )
    domains = bn.Domains.load(model, out)
    domains.select("first")
    assert torch.equal(model[1].running_mean, expected[1].running_mean)


def test_the_accuracy_of_a_data_set_by_name_is_told(foreign, capsys):
    command = ["adapt", MODEL, "--data", "digits", "--num-batches", "5", "--trust", "--out", "new.pt"]
    assert main(command) == 0
    said = capsys.readouterr().out
    before, after = (float(said.split("test images: ")[1].split()[place]) for place in (0, 2))
    for accuracy in (before, after):
        assert accuracy == pytest.approx(round(accuracy * 359) / 359, abs=1e-4)


REFUSED = {
    "no data": (["adapt", MODEL, "--out", "x.pt"], "--data is needed, of the other domain"),
    "a single example": (
        ["adapt", MODEL, "--data", "adapted_models:one", "--out", "x.pt"],
        "standard error of 1.00 deviations",
    ),
    "another method's option": ([*GIVEN, "--prior", "3", "--out", "x.pt"], "prior is of method='blended'"),
    "no ending": ([*GIVEN, "--out", "x"], "must end in .safetensors or .pt"),
    "domains elsewhere": (
        [*GIVEN, "--domain", "a", "--out", "x.pt"],
        "must end in .safetensors: with --domain",
    ),
    "no batches": ([*GIVEN, "--num-batches", "0", "--out", "x.pt"], "--num-batches must be at least 1"),
    "no domains": (
        [*GIVEN, "--domain", "a", "--out", "other.safetensors", "--trust"],
        "has no domains that can",
    ),
    "a file that is there": ([*GIVEN, "--out", "there.pt", "--trust"], "exists and is kept"),
    "a collapse": (
        [*GIVEN, "--method", "entropy", "--rate", "30", "--epochs", "30", "--trust", "--out", "x.pt"],
        "nothing was written: learning collapsed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_writes_nothing(foreign, capsys, case):
    folder, _module = foreign
    (folder / "there.pt").write_bytes(b"older")
    (folder / "other.safetensors").write_bytes(b"other")
    arguments, says = REFUSED[case]
    assert main(arguments) == 2
    assert says in capsys.readouterr().err
    assert not list(folder.glob("x*"))
    assert (folder / "there.pt").read_bytes() == b"older"
    assert (folder / "other.safetensors").read_bytes() == b"other"


def test_a_run_is_adapted_to_another_data_set_in_the_size_of_its_own(tmp_path, capsys):
    random = np.random.default_rng(0)
    images = {
        f"x_{part}": random.integers(0, 256, (48, 16, 16), dtype=np.uint8) for part in ("train", "test")
    }
    np.savez(tmp_path / "usps.npz", **images, y_train=np.arange(48) % 10, y_test=np.arange(48) % 10)
    run, out = tmp_path / "run", tmp_path / "usps.safetensors"
    assert main(["train", "bn-mlp", "--data", "digits", "--steps", "2", "--out", str(run)]) == 0
    flags = ["--data", "usps", "--data-dir", str(tmp_path), "--trust", "--out", str(out)]
    assert main(["adapt", str(run), *flags]) == 0
    assert "accuracy on test images" in capsys.readouterr().out
    adapted = safetensors.torch.load_file(out)
    seen = load("usps", tmp_path, size=28).train_images.reshape(48, -1)
    first = adapted["linear1.weight"] @ torch.from_numpy(seen > 127).float().T
    torch.testing.assert_close(adapted["sigmoid1_bn.running_mean"], first.mean(1), rtol=1e-4, atol=1e-4)
    flags = ["--data", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path / "other.safetensors")]
    assert main(["adapt", str(run), *flags]) == 2
    assert not (tmp_path / "other.safetensors").exists()
