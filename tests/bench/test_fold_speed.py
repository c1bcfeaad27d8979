"""`batchnorm bench fold`: the networks are what they are called, and the figures of what was asked."""

import json

import pytest
import torch
from torch import nn

from batchnorm.bench import fold
from batchnorm.bench.zoo import ZOO
from batchnorm.cli.main import main

SMALL = [name for name in ZOO if name != "inception"]
# Normalizations folded, and left: those of a DenseNet whose input others see too.
COUNTS = {
    "cifar10": (69, 0),
    "resnet": (21, 0),
    "densenet": (18, 21),
    "mobilenet": (23, 0),
    "unet": (17, 0),
    "1d": (5, 0),
    "3d": (6, 0),
}


@pytest.mark.parametrize("name", ["1d", "densenet"])
def test_figures(name):
    found = fold.measure(network=name, batches=(1, 2), rounds=2, compiled=False)
    assert (found["folded"], found["left"]) == COUNTS[name]
    assert found["difference"] < 1e-5
    forms = {fold.EAGER, fold.FOLDED, fold.BOTH, fold.LIMIT}
    assert set(found["milliseconds"]["batch 2"]) == forms | (set() if name == "1d" else {fold.CHANNELS_LAST})
    one, two = (found["speed_up"][f"batch {n}"]["eager"] for n in (1, 2))
    assert found["geometric_mean"]["eager"] == pytest.approx((one * two) ** 0.5, rel=2e-3)
    eager, folded = (found["milliseconds"]["batch 1"][form][0] for form in (fold.EAGER, fold.FOLDED))
    assert one == pytest.approx(eager / folded, rel=0.02)


@pytest.mark.parametrize("name", SMALL)
def test_networks_take_their_inputs_and_are_normalized(name):
    model = ZOO[name].make()
    num_norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert num_norms == sum(COUNTS[name])
    with torch.no_grad():
        y = model.eval()(torch.randn(2, *ZOO[name].shape))
    assert y.shape == ((2, 2, 64, 64) if name == "unet" else (2, 10))


def test_the_limit_has_no_normalization_and_the_network_keeps_its_own():
    model = ZOO["1d"].make()
    bare = fold._without(model)
    assert not any(isinstance(m, nn.BatchNorm1d) for m in bare.modules())
    assert sum(isinstance(m, nn.BatchNorm1d) for m in model.modules()) == 5


def test_command(tmp_path, capsys):
    out = tmp_path / "fold.json"
    flags = ["--networks", "1d", "--batches", "1", "--rounds", "2", "--no-compiled", "--out", str(out)]
    assert main(["bench", "fold", *flags]) == 0
    (occasion,) = json.loads(out.read_text())["occasions"]
    assert occasion["results"]["network"] == ZOO["1d"].title
    shown = " ".join(capsys.readouterr().out.split())
    assert "5 normalizations folded, 0 left" in shown
    assert "geometric mean over 1 networks" in shown
