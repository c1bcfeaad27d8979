"""The Triton kernels: every dtype, layout, fusion, activation and cut, as exact as eager PyTorch."""

import pytest
import torch
from gpu_cases import DEVICE, compare, layouts, need_device, small_tiles

from batchnorm.kernels import gpu
from batchnorm.kernels.activations import TABLE

need_device()

SHAPES = {
    "N C": (9, 5),
    "fewest samples": (2, 3),
    "batch of one with locations": (1, 3, 7),
    "nothing divides": (5, 3, 11),
    "one channel": (6, 1, 3, 3),
    "long planes": (2, 2, 37),
    "many rows": (40, 6),
    "many channels": (2, 11, 2, 2),
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
    x = torch.randn(5, 2, 13, device=DEVICE).to(dtype)
    layout = "channels last" if dtype.itemsize % 4 else "contiguous"
    compare(layouts(x)[layout], given=given, **fusion)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", sorted(TABLE))
def test_activations(activation, with_residual, dtype):
    x = torch.randn(6, 4, 15, dtype=torch.float64).to(dtype)
    compare(x, activation=activation, with_residual=with_residual)


@pytest.mark.parametrize("activation", sorted(set(TABLE) - {"relu"}))
def test_activations_of_small_values_keep_their_digits(activation):
    # With γ and β near zero, exp(z) − 1 and the like would be left with the rounding of 1.
    z = torch.linspace(-1e-3, 1e-3, 64).reshape(64, 1)
    mean, var = z.new_zeros(1), z.new_ones(1)
    y = gpu.apply(z.to(DEVICE), mean, var, None, None, None, None, 0.0, activation).cpu()
    rounding = 4e-7 * z.abs() if TABLE[activation].value(torch.zeros(())) == 0 else 2e-7
    assert ((y - TABLE[activation].value(z.double())).abs() <= rounding).all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("activation", sorted(TABLE))
def test_activations_of_huge_values(activation):
    z = torch.tensor([-1e30, -1e4, -90.0, 90.0, 1e4, 1e30]).reshape(6, 1)
    ones, zeros = torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    given = (zeros, ones, None, None, None, None, 0.0, activation)
    y = gpu.apply(z.to(DEVICE), *given)
    dz = gpu.apply_backward(torch.ones_like(y), z.to(DEVICE), None, *given)[0]
    torch.testing.assert_close(y.cpu(), TABLE[activation].value(z), rtol=1e-6, atol=1e-30)
    expected = TABLE[activation].derivative(z.double()).float()
    torch.testing.assert_close(dz.cpu(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("with_mask", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_mean_of_1e4_with_deviation_1(dtype, with_mask):
    for x in layouts((1e4 + torch.randn(8, 2, 20, dtype=torch.float64)).to(dtype)).values():
        compare(x, activation="sigmoid", with_mask=with_mask)
