"""The Triton kernels: every dtype, layout, fusion, activation and cut, as exact as eager PyTorch."""

import pytest
import torch
from gpu_cases import DEVICE, compare, layouts, needs_device, small_tiles

from batchnorm.kernels.activations import TABLE

pytestmark = needs_device

SHAPES = {
    "N C": (9, 5),
    "fewest samples": (2, 3),
    "batch of one with locations": (1, 3, 7),
    "nothing divides": (5, 3, 11),
    "one channel": (6, 1, 3, 3),
    "long planes": (2, 2, 37),
    "many rows": (70, 6),
    "many channels": (2, 19, 2, 2),
    "N C D H W": (2, 3, 2, 3, 5),
}
FUSIONS = {
    "plain": {},
    "residual": {"with_residual": True},
    "mask": {"with_mask": True},
    "residual and mask": {"with_residual": True, "with_mask": True},
    "not affine": {"affine": False},
}


@pytest.fixture(params=["one program", "splits"])
def cut(request, monkeypatch):
    """Tiles as they are, so that a program does a channel at once, or small ones in splits."""
    if request.param == "splits":
        small_tiles(monkeypatch)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("given", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes_and_layouts(shape, given):
    for x in layouts(torch.randn(shape, device=DEVICE)).values():
        compare(x, given=given, activation="silu")


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("given", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS.values(), ids=FUSIONS)
def test_dtypes_and_fusions(dtype, fusion, given):
    for x in layouts(torch.randn(5, 3, 13, device=DEVICE).to(dtype)).values():
        compare(x, given=given, **fusion)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", sorted(TABLE))
def test_activations(activation, with_residual, dtype):
    x = torch.randn(6, 4, 15, dtype=dtype) * 3
    compare(x, activation=activation, with_residual=with_residual)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_mean_of_1e4_with_deviation_1(dtype, with_mask):
    for x in layouts((1e4 + torch.randn(8, 2, 20, dtype=torch.float64)).to(dtype)).values():
        compare(x, activation="sigmoid", with_mask=with_mask)
