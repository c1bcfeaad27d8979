import copy

import pytest
import torch
from torch.library import opcheck

import batchnorm as bn
from batchnorm.kernels import ops

CASES = {
    "plain": {},
    "features only": {"shape": (6, 3)},
    "one channel": {"shape": (2, 1, 5)},
    "mask": {"mask": True},
    "residual and mask": {"residual": True, "mask": True},
    "not affine": {"affine": False},
    "channels last": {"channels_last": True, "residual": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "empty": {"shape": (0, 3, 4)},
}


def arguments(
    shape=(4, 3, 5), *, mask=False, residual=False, affine=True, channels_last=False, dtype=torch.float32
):
    x = torch.randn(*shape, 2) if channels_last else torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x = x.to(dtype).requires_grad_()
    num_channels = x.shape[1]
    gamma, beta = torch.rand(num_channels).requires_grad_(), torch.randn(num_channels).requires_grad_()
    if not affine:
        gamma = beta = None
    extra = torch.randn_like(x, requires_grad=True) if residual else None
    shown = torch.rand(x.shape[:1] + x.shape[2:]) > 0.3 if mask else None
    return x, gamma, beta, extra, shown, 1e-5, "silu"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_normalize_keeps_its_contract(case):
    opcheck(torch.ops.batchnorm.normalize.default, arguments(**case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_normalize_backward_keeps_its_contract(case):
    x, gamma, beta, residual, mask, eps, activation = arguments(**case)
    y, mean, var, count = ops.normalize(x, gamma, beta, residual, mask, eps, activation)
    dy = torch.randn_like(y).requires_grad_()
    inputs = (dy, x, None, gamma, beta, residual, mask, mean, var, count, eps, activation)
    opcheck(torch.ops.batchnorm.normalize_backward.default, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_where_pytorchs_own_kernel_is_asked_for(dtype):
    x = torch.randn(8, 4, 5, 5, dtype=dtype)
    layer = bn.BatchNorm2d(4, activation="relu")
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    grads = []
    with bn.kernels.use("torch"):
        for run in (layer, compiled):
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.float().square().sum().backward()
            grads.append((y, leaf.grad))
    for eager, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, eager)
