"""What the tests of the CPU's kernels share: inputs in every layout, and the judge on all results."""

import torch
from judge import assert_as_exact_as_eager
from torch import Tensor

from batchnorm.kernels import cpu, native, reference
from batchnorm.kernels.contract import SIGN_IS_ENOUGH
from batchnorm.moments import Moments


def last(t: Tensor) -> Tensor:
    """The same values, channels last in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def inputs(
    shape, dtype=torch.float32, *, offset=0.0, residual=False, mask=False, affine=True, layout=lambda t: t
):
    """x, dy, γ, β, residual and mask, drawn in float64 and rounded."""
    x, dy, extra = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    x, dy, extra = (layout(t.to(dtype)) for t in (x + offset, dy, extra))
    wide = torch.promote_types(dtype, torch.float32)
    gamma, beta = torch.rand(shape[1], dtype=wide) + 0.5, torch.randn(shape[1], dtype=wide)
    shown = None
    if mask:
        shown = torch.rand(shape[:1] + tuple(shape[2:])) > 0.3
        shown.view(-1)[:2] = True
    return x, dy, gamma if affine else None, beta if affine else None, extra if residual else None, shown


def run(kernel, x, dy, gamma, beta, residual, mask, eps=1e-5, activation="relu", given=None):
    """Everything that a kernel gives, by name: with its own moments, or with ``given`` ones."""
    fused = (gamma, beta, residual, mask, eps, activation)
    if given is None:
        y, moments = kernel.forward(x, *fused)
    else:
        y, moments = kernel.apply(x, given.mean, given.var, *fused), given
    told = y if residual is not None and activation in SIGN_IS_ENOUGH else None
    fused = (gamma, beta, None if told is not None else residual, mask)
    if given is None:
        grads = kernel.backward(dy, x, told, *fused, moments, eps, activation)
    else:
        grads = kernel.apply_backward(dy, x, told, given.mean, given.var, *fused, eps, activation)
    found = {
        "y": y,
        "mean": moments.mean,
        "var": moments.var,
        "dx": grads[0],
        "dgamma": grads[1],
        "dbeta": grads[2],
    }
    if grads[3] is not None:
        found["dresidual"] = grads[3]
    return found, moments.count


def doubled(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def judge(arguments, *, eps=1e-5, activation="relu", given=None):
    """The kernels against float64 truth, allowed what PyTorch's own misses it by and rounding."""
    x, dy, gamma, _, _, mask = arguments
    rival = native if mask is None else reference
    truth, count = run(
        reference, *map(doubled, arguments), eps, activation, given and given.to(torch.float64)
    )
    mine, counted = run(cpu, *arguments, eps, activation, given)
    eager, _ = run(rival, *arguments, eps, activation, given)
    assert int(count) == int(counted)
    flat = x.double().movedim(1, 0).flatten(1)
    if mask is not None:
        flat = torch.where(mask.flatten(), flat, flat[:, :1])
    deviation = (flat.var(1, unbiased=False) + eps).sqrt().min().item()
    condition = flat.mean(1).abs().max().item() / deviation
    x_hat = (flat - flat.mean(1, keepdim=True)).abs().max().item() / deviation
    steep = dy.double().abs().max().item() * 1.2 * (1.5 if gamma is not None else 1)
    terms = {"y": 1.5 * x_hat, "dx": steep * max(x_hat, 1) / deviation, "var": deviation**2}
    terms["mean"] = flat.abs().max().item()
    terms |= dict.fromkeys(("dgamma", "dbeta"), steep * flat.shape[1] ** 0.5 * max(x_hat, 1))
    assert mine.keys() == truth.keys()
    for name, got in mine.items():
        expected = torch.float64 if x.dtype == torch.float64 else torch.float32
        assert got.dtype == (x.dtype if name in ("y", "dx", "dresidual") else expected)
        assert_as_exact_as_eager(
            got, eager[name], truth[name], condition=condition, name=name, terms=terms.get(name, 0.0)
        )
    return mine


def moments_of(x: Tensor) -> Moments:
    return Moments(torch.randn(x.shape[1]) * 0.3, torch.rand(x.shape[1]) + 0.2, 0).to(
        torch.promote_types(x.dtype, torch.float32)
    )
