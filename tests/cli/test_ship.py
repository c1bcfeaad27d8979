"""batchnorm fold, recalibrate and export: runs and foreign models, and what they refuse."""

import json
import sys

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.cli.saved import load_weights, open_saved
from batchnorm.data import load

ort = pytest.importorskip("onnxruntime", reason='pip install "batchnorm[export]"')

MODULE = """
import torch
from torch import nn

def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(),
        nn.Linear(144, 10), nn.BatchNorm1d(10))

def batches():
    torch.manual_seed(1)
    return [(5 + 2 * torch.randn(20, 1, 28, 28), torch.randint(10, (20,))) for _ in range(4)]

def example():
    return batches()[0][0][:3]

def number():
    return 3
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A working directory with a module of the user's, weights of its network, and its trained network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shipped_models", raising=False)
    (tmp_path / "shipped_models.py").write_text(MODULE)
    import shipped_models

    torch.manual_seed(0)
    model = shipped_models.net()
    for x, _ in shipped_models.batches():
        model(x)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "w.safetensors")
    return tmp_path, model, shipped_models


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bn"
    options = ["--steps", "60", "--hidden", "10", "10", "--no-progress", "--no-tensorboard"]
    assert main(["train", "bn-mlp", "--out", str(folder), *options]) == 0
    return folder


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("weights", ["w.pt", "w.safetensors"])
def test_fold_of_a_foreign_model(foreign, capsys, ending, weights):
    folder, model, module = foreign
    out = f"folded.{ending}"
    assert (
        main(["fold", "shipped_models:net", "--weights", weights, "--input", "1", "28", "28", "--out", out])
        == 0
    )
    said = capsys.readouterr().out
    assert "folded into 0" in said
    assert "folded into 5" in said
    x = module.example()
    expected, _ = bn.fold(model, x)
    if ending == "safetensors":
        got = open_saved("shipped_models:net", folder / out, None, None).model
    else:
        got, _ = bn.fold(module.net().eval(), x)
        got.load_state_dict(torch.load(folder / out, weights_only=True))
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in got.modules())
    assert torch.equal(got(x), expected(x))
    torch.testing.assert_close(got(x), model(x), rtol=1e-4, atol=1e-5)


def test_recalibrate_of_a_foreign_model_with_batches_of_a_function(foreign, capsys):
    folder, model, module = foreign
    command = ["recalibrate", "shipped_models:net", "--weights", "w.pt", "--data", "shipped_models:batches"]
    assert main([*command, "--out", "new.pt"]) == 0
    assert "recalibrated 2 layers" in capsys.readouterr().out
    new = torch.load(folder / "new.pt", weights_only=True)
    bn.recalibrate(model, module.batches())
    assert all(torch.equal(new[name], t) for name, t in model.state_dict().items())
    # A file that is there is kept.
    before = (folder / "new.pt").read_bytes()
    assert main([*command, "--out", "new.pt"]) == 2
    assert "--force" in capsys.readouterr().err
    assert (folder / "new.pt").read_bytes() == before
    assert main([*command, "--out", "new.pt", "--method", "pooled", "--force"]) == 0
    assert (folder / "new.pt").read_bytes() != before


def test_recalibrate_of_a_data_set_tells_accuracy_on_all_test_images(foreign, capsys):
    command = ["recalibrate", "shipped_models:net", "--weights", "w.pt", "--data", "digits", "--keep-better"]
    assert main([*command, "--num-batches", "10", "--out", "new.safetensors"]) == 0
    said = capsys.readouterr().out
    accuracy = float(said.split("metric: ")[1].split()[0])
    assert accuracy == pytest.approx(round(accuracy * 359) / 359, abs=1e-3)


def test_averaged_weights_go_through_recalibrate_before_they_are_shipped(foreign, capsys):
    folder, model, module = foreign
    bn.recalibrate(model, module.batches())
    average = AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(model)
    torch.save(average.state_dict(), folder / "swa.pt")
    given = ["shipped_models:net", "--weights", "swa.pt"]
    for command in (["fold", *given, "--out", "f.pt"], ["export", *given, "--out", "e.pt2"]):
        assert main([*command, "--input", "1", "28", "28"]) == 2
        assert "averaged-weights" in capsys.readouterr().err
    assert main(["recalibrate", *given, "--data", "shipped_models:batches", "--out", "settled.pt"]) == 0
    settled = ["shipped_models:net", "--weights", "settled.pt", "--example", "shipped_models:example"]
    assert main(["export", *settled, "--out", "e.pt2"]) == 0
    assert main(["export", *given, "--data", "shipped_models:batches", "--check-data", "--out", "m.pt2"]) == 0
    assert {path.name for path in folder.glob("*.pt*")} == {"w.pt", "swa.pt", "settled.pt", "e.pt2", "m.pt2"}


def test_export_of_a_run_holds_classes_inputs_and_recipe(a_run, tmp_path, capsys):
    out = tmp_path / "bn.onnx"
    assert main(["export", str(a_run), "--fold", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "folded into linear1" in said
    assert "onnxruntime, batch of 1: differs by" in said
    session = ort.InferenceSession(out, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == [str(digit) for digit in range(10)]
    assert json.loads(about["normalization"])["threshold"] == 128
    provenance = json.loads(about["provenance"])
    assert provenance["recipe"]["hidden"] == [10, 10]
    assert provenance["run"] == "bn"
    assert len(provenance["weights_sha256"]) == 64
    assert str(tmp_path).encode() not in out.read_bytes()
    data = load("digits")
    images = (data.test_images >= 128).astype("float32")
    logits = session.run(None, {"input": images})[0]
    model = open_saved(str(a_run), None, None, None).model
    with torch.no_grad():
        expected = model(torch.from_numpy(images))
    assert (logits.argmax(1) == expected.argmax(1).numpy()).all()


def test_fold_and_recalibrate_of_a_run(a_run, tmp_path, capsys):
    folded, new = tmp_path / "folded.safetensors", tmp_path / "new.safetensors"
    assert main(["fold", str(a_run), "--out", str(folded)]) == 0
    assert main(["recalibrate", str(a_run), "--out", str(new)]) == 0
    assert "the same (higher is better)" in capsys.readouterr().out  # the run's own are population statistics
    ours = open_saved(str(a_run), None, None, None).model
    again = open_saved(str(a_run), new, None, None).model
    x = torch.rand(5, 28, 28)
    torch.testing.assert_close(again(x), ours(x))
    torch.testing.assert_close(
        open_saved(str(a_run), folded, None, None).model(x), ours(x), rtol=1e-4, atol=1e-5
    )


REFUSED = {
    "never trained": (["export", "shipped_models:net", "--input", "1", "28", "28"], "never-updated: 1, 6"),
    "never trained, folded": (
        ["fold", "shipped_models:net", "--input", "1", "28", "28"],
        "never-updated: 1, 6",
    ),
    "no example": (["fold", "shipped_models:net", "--weights", "w.pt"], "--input 3 224 224"),
    "no data": (["recalibrate", "shipped_models:net", "--weights", "w.pt"], "--data is needed"),
    "another architecture": (
        ["fold", "shipped_models:net", "--weights", "other.pt"],
        "does not fit Sequential",
    ),
    "statistics too long": (
        ["export", "shipped_models:net", "--weights", "long.pt"],
        "size mismatch for 1.running_mean: copying a param with shape torch.Size([5])",
    ),
    "not finite": (
        ["export", "shipped_models:net", "--weights", "nan.pt", "--input", "1", "28", "28"],
        "not-finite: 1.running_var",
    ),
    "no such function": (
        ["fold", "shipped_models:nett"],
        "'nett'; it has net, batches, example",
    ),
    "no model": (["fold", "shipped_models:number"], "returned int; a torch.nn.Module is needed"),
    "no such weights": (["fold", "shipped_models:net", "--weights", "none.pt"], "none.pt"),
    "wrong example": (
        ["fold", "shipped_models:net", "--weights", "w.pt", "--input", "3", "8", "8"],
        "fails on the",
    ),
    "example of no tensors": (
        ["fold", "shipped_models:net", "--weights", "w.pt", "--example", "shipped_models:number"],
        "must return a tensor or a tuple of tensors, got int",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_overwrites_nothing(foreign, capsys, case):
    folder, model, _ = foreign
    state = model.state_dict()
    torch.save(nn.Linear(3, 3).state_dict(), folder / "other.pt")
    torch.save({**state, "1.running_mean": torch.zeros(5)}, folder / "long.pt")
    torch.save({**state, "1.running_var": torch.full((4,), torch.nan)}, folder / "nan.pt")
    arguments, says = REFUSED[case]
    out = folder / ("out.pt2" if arguments[0] == "export" else "out.pt")
    out.write_bytes(b"older")
    before = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    assert main([*arguments, "--out", str(out), "--force"]) == 2
    assert says in capsys.readouterr().err
    assert out.read_bytes() == b"older"
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize("command", ["fold", "recalibrate", "export"])
def test_names_that_cannot_be_written_are_said_before_any_work(foreign, capsys, command):
    for out, says in (
        ("there/x.pt2" if command == "export" else "there/x.pt", "no such folder"),
        (".", "folder"),
    ):
        assert main([command, "shipped_models:absent", "--out", out]) == 2
        error = capsys.readouterr().err
        assert says in error or "must end in" in error


def test_a_weights_file_of_another_folded_model_is_said_so(foreign):
    folder, _, module = foreign
    about = {"batchnorm": json.dumps({"folded": [["float99", [1]]]})}
    safetensors.torch.save_file({"x": torch.ones(1)}, folder / "f.safetensors", about)
    with pytest.raises(ValueError, match="does not tell the inputs"):
        load_weights(module.net(), folder / "f.safetensors")
