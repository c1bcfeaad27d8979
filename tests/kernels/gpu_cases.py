"""Where the Triton kernels can run here, and how one case of theirs is judged."""

import os

import pytest
import torch
import torch.nn.functional as F
from judge import assert_as_exact_as_eager

from batchnorm.kernels import gpu, gpu_plan
from batchnorm.kernels.activations import TABLE
from batchnorm.kernels.contract import SIGN_IS_ENOUGH
from batchnorm.moments import Moments

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None
KINKS = {"relu": (0,), "leaky_relu": (0,), "hardswish": (-3, 3)}
"""Where slopes jump: there no kernel is wrong, whichever side its rounding falls on."""


def need_device():
    """Skip the module that calls this, unless the kernels can run."""
    if DEVICE is None:
        reason = "no CUDA device; test_gpu_interpreter.py runs these in Triton's interpreter"
        pytest.skip(reason, allow_module_level=True)


def small_tiles(monkeypatch):
    """Cut small tensors as large ones are: many tiles, in splits, with remainders."""
    monkeypatch.setattr(gpu_plan, "TILE", 64)
    monkeypatch.setattr(gpu_plan, "RUN", 4)
    monkeypatch.setattr(gpu_plan, "LONGEST_RUN", 16)
    monkeypatch.setattr(gpu_plan, "WHOLE_TILES", 2)
    monkeypatch.setattr(gpu_plan, "PROGRAMS_PER_PROCESSOR", 1)


def layouts(x):
    """The same values lying differently in memory."""
    wider = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    return {
        "contiguous": x,
        "channels last": x.movedim(1, -1).contiguous().movedim(-1, 1),
        "strided": wider[..., ::2].copy_(x),
    }


def compare(
    x, *, activation="relu", with_residual=False, with_mask=False, affine=True, given=False, eps=1e-5
):
    """Judge a forward and a backward pass against float64 truth, beside eager PyTorch.

    With ``given`` the statistics are given; else they are those of the batch.
    """
    x = x.to(DEVICE)
    num_channels, wide = x.shape[1], torch.promote_types(x.dtype, torch.float32)
    gamma, beta, residual, mask = None, None, None, None
    if affine:
        gamma, beta = torch.rand(2, num_channels, dtype=wide, device=DEVICE) + 0.5
    dy = torch.randn_like(x)
    if with_residual:
        residual = torch.randn_like(x)
    if with_mask:
        mask = torch.rand(x.shape[:1] + x.shape[2:], device=DEVICE) > 0.3
        mask.view(-1)[:2] = True
        x, dy, residual = (
            t if t is None else t.masked_fill(~mask.unsqueeze(1), torch.nan) for t in (x, dy, residual)
        )
    shown = x.double().movedim(1, -1)[mask if with_mask else ...].reshape(-1, num_channels)
    moments = Moments.of(shown)
    if given:
        moments = Moments((shown[0] + 0.5).to(wide), (moments.var + 0.5).to(wide), 1)

    def as_paper(x, gamma, beta, residual):
        of = moments.to(torch.promote_types(x.dtype, torch.float32)) if given else Moments.of(x, mask=mask)
        return transform(x, of, gamma, beta, residual, mask, eps, activation), of

    def as_torch(x, gamma, beta, residual):
        mean, var = (moments.mean, moments.var) if given else (None, None)
        y = F.batch_norm(x, mean, var, gamma, beta, not given, 0.0, eps)
        y = TABLE[activation].value(y if residual is None else y + residual)
        return y, moments.to(wide) if given else Moments.of(x)

    inputs = (x, gamma, beta, residual)
    doubled = [t if t is None else t.double() for t in inputs]
    z = transform(doubled[0], moments, *doubled[1:], mask, eps, "identity")
    for kink in KINKS.get(activation, ()):
        dy = torch.where((z - kink).abs() < 1e-2 * (1 + z.abs()), 0, dy)
    truth = _by_autograd(as_paper, doubled, dy.double())
    eager = _by_autograd(as_paper if with_mask else as_torch, inputs, dy)
    got = _ours(*inputs, mask, eps, activation, dy, moments if given else None)

    deviation = (moments.var.double() + eps).sqrt()
    condition = (moments.mean.abs() / deviation).max().item()
    x_hat = ((shown - moments.mean).abs().amax(0) / deviation).max().item()
    each = 1.2 * dy.nan_to_num().abs().max().item()  # times the steepest activation's slope
    # What is summed: y of three terms; ∂x of three that can cancel; ∂γ and ∂β over the batch.
    sums = each * len(shown) ** 0.5 * max(x_hat, 1.0)
    terms = {"y": 1.5 * x_hat, "dx": 1.5 * each * max(x_hat, 1.0) / deviation.min().item()}
    terms |= {"dgamma": sums, "dbeta": sums, "dresidual": each, "mean": shown.abs().max().item()}
    assert got.keys() == truth.keys()
    for name in truth:
        assert_as_exact_as_eager(
            got[name], eager[name], truth[name], condition=condition, name=name, terms=terms.get(name, 0.0)
        )
    assert got["y"].dtype == got["dx"].dtype == x.dtype
    assert got["y"].stride() == got["dx"].stride() == torch.empty_like(x).stride()


def transform(x, moments, gamma, beta, residual, mask, eps, activation):
    """The definition, in float32 or wider."""
    if mask is not None:
        shown = mask.unsqueeze(1)
        x = torch.where(shown, x, 0)
        residual = residual if residual is None else torch.where(shown, residual, 0)
    vector = [1, -1] + [1] * (x.dim() - 2)
    z = (x - moments.mean.view(vector)) / (moments.var.view(vector) + eps).sqrt()
    z = z if gamma is None else z * gamma.view(vector)
    z = z if beta is None else z + beta.view(vector)
    z = z if residual is None else z + residual
    y = TABLE[activation].value(z).to(x.dtype)
    return y if mask is None else torch.where(shown, y, 0)


def _by_autograd(f, tensors, dy):
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    y, moments = f(*leaves)
    y.backward(dy.to(y.dtype))
    return _named(y, moments, *(t if t is None else t.grad for t in leaves))


def _named(y, moments, dx, dgamma, dbeta, dresidual):
    named = {"y": y, "mean": moments.mean, "var": moments.var, "dx": dx}
    named |= {"dgamma": dgamma, "dbeta": dbeta, "dresidual": dresidual}
    return {name: t.detach() for name, t in named.items() if t is not None}


def _ours(x, gamma, beta, residual, mask, eps, activation, dy, given):
    assert gpu.refuses(x, gamma, beta, residual, mask, activation) == ""
    if given is None:
        y, moments = gpu.forward(x, gamma, beta, residual, mask, eps, activation)
        expected = x.numel() // x.shape[1] if mask is None else mask.sum()
        assert type(moments.count) is type(expected)
        assert moments.count == expected
    else:
        moments = given
        y = gpu.apply(x, given.mean, given.var, gamma, beta, residual, mask, eps, activation)
    # The contract: where a sign is enough, y is kept in the residual's stead.
    has_sign = residual is not None and activation in SIGN_IS_ENOUGH
    kept, residual_kept = (y, None) if has_sign else (None, residual)
    if given is None:
        gradients = gpu.backward(dy, x, kept, gamma, beta, residual_kept, mask, moments, eps, activation)
    else:
        gradients = gpu.apply_backward(
            dy, x, kept, given.mean, given.var, gamma, beta, residual_kept, mask, eps, activation
        )
    dx, dgamma, dbeta, dresidual = gradients
    assert (dresidual is None) == (residual is None)
    if gamma is None:
        dgamma = dbeta = None
    return _named(y, moments, dx, dgamma, dbeta, dresidual)
