"""Operator contracts: schema, fake and gradient, no arithmetic.

Registered with `torch.library`, so `torch.compile`, `torch.export` and `opcheck` know them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.contract import SIGN_IS_ENOUGH, Kernel
from batchnorm.moments import Moments


@torch.library.custom_op("batchnorm::normalize", mutates_args=())
def normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Kernel.forward` as an operator: y, mean, biased variance and count (int64, shape ())."""
    kernel = kernel_for(x, gamma, beta, residual, mask, activation)
    y, moments = kernel.forward(x, gamma, beta, residual, mask, eps, activation)
    count = torch.as_tensor(moments.count, dtype=torch.int64, device=x.device)
    return laid_out_as(x, y), moments.mean, moments.var, count


@normalize.register_fake
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_outputs(x)


@torch.library.custom_op("batchnorm::normalize_backward", mutates_args=())
def normalize_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Kernel.backward` as an operator; without a residual (given, or told by ``y``) the last is empty."""
    kernel, moments = kernel_for(x, gamma, beta, residual, mask, activation), Moments(mean, var, count)
    if kernel is dispatch.KERNELS["torch"]:
        # Its gradient is autograd's, which records nothing inside an operator.
        kernel = dispatch.KERNELS["reference"]
    dx, dgamma, dbeta, dz = kernel.backward(dy, x, y, gamma, beta, residual, mask, moments, eps, activation)
    return laid_out_as(x, dx), dgamma, dbeta, residual_gradient(x, dy, dz)


@normalize_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(x, mean, joined=y is not None or residual is not None)


def kernel_for(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> Kernel:
    """The kernel of an operator's call."""
    # Fast kernels take tensors that hold something.
    if not x.numel():
        return dispatch.KERNELS["reference"]
    return dispatch.choose(x, gamma, beta, residual, mask, activation)


def fake_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, mean, variance and count, of the shapes and dtypes that an operator gives for ``x``."""
    mean = x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), mean, torch.empty_like(mean), x.new_empty((), dtype=torch.int64)


def fake_gradients(x: Tensor, mean: Tensor, *, joined: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """∂x, ∂γ, ∂β and ∂residual likewise; without a residual the last is empty."""
    dz = torch.empty_like(x) if joined else x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean), dz


def residual_gradient(x: Tensor, dy: Tensor, dz: Tensor | None) -> Tensor:
    """∂residual as an operator may give it: never its own input, and empty where there is none."""
    if dz is None:
        return x.new_empty(0)
    return torch.empty_like(x).copy_(dz) if dz is dy else laid_out_as(x, dz)


def laid_out_as(x: Tensor, t: Tensor) -> Tensor:
    """``t``, or a copy where an operator may not return it in place of an ``empty_like(x)``."""
    # The fakes promise the input's memory format and dtype, and no output may be another's memory.
    fresh = torch.empty_like(x)
    fits = t.dtype == x.dtype and t.stride() == fresh.stride() and t._base is None
    return t if fits else fresh.copy_(t)


def _remember(ctx, inputs, output):
    x, gamma, beta, residual, mask, ctx.eps, ctx.activation = inputs
    y, mean, var, count = output
    if residual is not None and ctx.activation in SIGN_IS_ENOUGH:
        ctx.has_residual, residual = True, None
    else:
        ctx.has_residual, y = residual is not None, None
    ctx.save_for_backward(x, y, gamma, beta, residual, mask, mean, var, count)
    ctx.mark_non_differentiable(mean, var, count)  # they feed running averages, never a loss


def _gradients(ctx, dy, *_):
    x, y, gamma, beta, residual, mask, mean, var, count = ctx.saved_tensors
    dx, dgamma, dbeta, dz = normalize_backward(
        dy, x, y, gamma, beta, residual, mask, mean, var, count, ctx.eps, ctx.activation
    )
    return (
        dx,
        None if gamma is None else dgamma.to(gamma.dtype),
        None if beta is None else dbeta.to(beta.dtype),
        dz if ctx.has_residual else None,
        None,
        None,
        None,
    )


normalize.register_autograd(_gradients, setup_context=_remember)


def _remember_backward(ctx, inputs, output):
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, *grads):
    # The moments are functions of x here: they are taken again, so that their share is counted.
    *saved, mask, _, _, _ = ctx.saved_tensors
    with torch.enable_grad():
        saved = [t if t is None else t.detach().requires_grad_() for t in saved]
        dy, x, y, gamma, beta, residual = saved
        moments = Moments.of(x, mask=mask)
        found = reference.backward(dy, x, y, gamma, beta, residual, mask, moments, ctx.eps, ctx.activation)
    outputs = [out for out in found if out is not None]
    wide = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=False)]
    wanted = [t for t in saved if t is not None]
    second = iter(torch.autograd.grad(outputs, wanted, wide, allow_unused=True))
    return *(None if t is None else next(second) for t in saved), None, None, None, None, None, None


normalize_backward.register_autograd(_second_gradients, setup_context=_remember_backward)


def _lane_by_lane(operator: Any) -> Callable[..., tuple[Any, Any]]:
    """The rule of `torch.vmap` for an operator: its outputs for each lane, stacked."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        lanes = [
            operator(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        outputs = tuple(torch.stack(parts) for parts in zip(*lanes, strict=True))
        return outputs, (0,) * len(outputs)

    return rule


normalize.register_vmap(_lane_by_lane(normalize))
normalize_backward.register_vmap(_lane_by_lane(normalize_backward))
