"""Normalization by the moments of all ranks' samples, and its gradient, as operators.

Each runs the fast kernels on this rank's samples and one collective: the contracts and the
arithmetic that is left. Shapes: R ranks, N batch, C channels, S all locations.
"""

from typing import Any

import torch
from torch import Tensor

from batchnorm.distributed.collectives import all_sum, gather_moments, sum_gradients
from batchnorm.distributed.watchdog import Call
from batchnorm.kernels import dispatch, reference
from batchnorm.kernels.activations import TABLE
from batchnorm.kernels.contract import SIGN_IS_ENOUGH, Kernel
from batchnorm.kernels.ops import (
    fake_gradients,
    fake_outputs,
    kernel_for,
    laid_out_as,
    residual_gradient,
)
from batchnorm.moments import Moments


@torch.library.custom_op("batchnorm::synced_normalize", mutates_args=())
def normalize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    group: str,
    place: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Algorithm 1 over the samples of all ranks of a group.

    Args:
        x: This rank's samples, shape (N, C, *spatial); there may be none.
        gamma: As in `batchnorm.kernels.contract.Kernel.forward`; so are the others up to ``activation``.
        group: Name of the group.
        place: The layer's path in the model, for the watchdog.

    Returns:
        This rank's y; mean, biased variance and count (int64, shape ()) of all ranks' samples.
    """
    local = _local_moments(x, mask, eps)
    whole = gather_moments(local, group, place)
    kernel = _kernel(x, gamma, beta, residual, mask, activation)
    y = kernel.apply(x, whole.mean, whole.var, gamma, beta, residual, mask, eps, activation)
    return laid_out_as(x, y), whole.mean, whole.var, torch.as_tensor(whole.count)


def _kernel(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> Kernel:
    if x.is_cpu and 0 < x.numel() <= dispatch.FEW_ELEMENTS and dispatch.is_automatic():
        return dispatch.KERNELS["torch" if mask is None else "reference"]
    return kernel_for(x, gamma, beta, residual, mask, activation)


def _local_moments(x: Tensor, mask: Tensor | None, eps: float) -> Moments:
    kernel = _kernel(x, None, None, None, mask, "identity")
    if not x.numel() or kernel is dispatch.KERNELS["torch"]:
        # PyTorch's own kernel hands out the unbiased variance, which a single sample has none of.
        return Moments.of(x, mask=mask)
    return kernel.forward(x, None, None, None, mask, eps, "identity")[1]


@normalize.register_fake
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    group: str,
    place: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_outputs(x)


@torch.library.custom_op("batchnorm::synced_normalize_backward", mutates_args=())
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
    group: str,
    place: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum of all ranks' losses through the moments of all ranks' samples.

    Args:
        dy: Gradient of this rank's loss.
        y: As in `batchnorm.kernels.contract.Kernel.backward`; so are the others.

    Returns:
        ∂x; this rank's share of ∂γ and ∂β, whose sum over ranks is the whole, as of any parameter
        in data-parallel training; ∂residual, empty where there is no residual.
    """
    joined = y is not None or residual is not None
    kernel = _kernel(x, gamma, beta, residual, mask, activation)
    held = (mean, var, gamma, beta, residual, mask, eps, activation)
    # PyTorch's kernel leaves its gradients to autograd, which does not see into an operator.
    first = dispatch.KERNELS["reference"] if kernel is dispatch.KERNELS["torch"] else kernel
    dx, dgamma, dbeta, dz = first.apply_backward(dy, x, y, *held)
    of_z, of_x_hat = sum_gradients(dbeta, dgamma, group, place)
    # What the moments' dependence on x adds, γ/σ/m · (Σdz + x̂·Σdz·x̂), has the form of a
    # normalization itself: one more pass of the same kernel takes it from what there is.
    scale = -(var.double() + eps).rsqrt() / count.clamp(min=1)
    scale = scale if gamma is None else scale * gamma
    slope, shift = (scale * of_x_hat).to(mean.dtype), (scale * of_z).to(mean.dtype)
    dx = kernel.apply(x, mean, var, slope, shift, dx, mask, eps, "identity")
    return laid_out_as(x, dx), dgamma, dbeta, residual_gradient(x, dy, dz if joined else None)


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
    group: str,
    place: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_gradients(x, mean, joined=y is not None or residual is not None)


def _remember(ctx, inputs, output):
    x, gamma, beta, residual, mask, ctx.eps, ctx.activation, ctx.group, ctx.place = inputs
    y, mean, var, count = output
    ctx.has_residual = residual is not None
    if residual is not None and ctx.activation in SIGN_IS_ENOUGH:
        residual = None
    else:
        y = None
    ctx.save_for_backward(x, y, gamma, beta, residual, mask, mean, var, count)
    ctx.mark_non_differentiable(mean, var, count)  # they feed running averages, never a loss


def _gradients(ctx, dy, *_):
    x, y, gamma, beta, residual, mask, mean, var, count = ctx.saved_tensors
    saved = (x, y, gamma, beta, residual, mask, mean, var, count)
    dx, dgamma, dbeta, dz = normalize_backward(dy, *saved, ctx.eps, ctx.activation, ctx.group, ctx.place)
    return (
        dx,
        None if gamma is None else dgamma.to(gamma.dtype),
        None if beta is None else dbeta.to(beta.dtype),
        dz if ctx.has_residual else None,
        *(None,) * 5,
    )


normalize.register_autograd(_gradients, setup_context=_remember)


@torch.library.custom_op("batchnorm::sum_over_ranks", mutates_args=())
def sum_over_ranks(local: Tensor, group: str, place: str) -> Tensor:
    """The sum over ranks; its gradient is such a sum again, as every rank's loss depends on it."""
    return all_sum(local.clone(), group, Call("second backward", place, local.numel()))


@sum_over_ranks.register_fake
def _(local: Tensor, group: str, place: str) -> Tensor:
    return torch.empty_like(local)


def _remember_group(ctx, inputs, output):
    _, ctx.group, ctx.place = inputs


def _summed_gradient(ctx, grad):
    return sum_over_ranks(grad.contiguous(), ctx.group, ctx.place), None, None


sum_over_ranks.register_autograd(_summed_gradient, setup_context=_remember_group)


def _remember_backward(ctx, inputs, output):
    *tensors, ctx.eps, ctx.activation, ctx.group, ctx.place = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, *grads):
    # The moments are functions of all ranks' x here: they are taken again, so that their share is counted.
    *saved, mask, _, _, count = ctx.saved_tensors
    with torch.enable_grad():
        saved = [t if t is None else t.detach().requires_grad_() for t in saved]
        found = _differentiable_backward(saved, mask, count, ctx)
    outputs = [out for out in found if out is not None]
    wide = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=False)]
    wanted = [t for t in saved if t is not None]
    second = iter(torch.autograd.grad(outputs, wanted, wide, allow_unused=True))
    return *(None if t is None else next(second) for t in saved), *(None,) * 8


def _differentiable_backward(
    saved: list[Any], mask: Tensor | None, count: Tensor, ctx: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`normalize_backward` in operations that record a graph, sums over ranks included."""

    def total(v_C: Tensor) -> Tensor:
        return sum_over_ranks(v_C, ctx.group, ctx.place)

    dy, x, y, gamma, beta, residual = saved
    like, joined = x, y is not None or residual is not None
    x, dy = reference.widened(x, mask), reference.widened(dy, mask)
    residual, y = reference.widened(residual, mask), reference.widened(y, mask)
    m = count.clamp(min=1)
    mean = total(reference.sum_NS(x)) / m
    deviation = reference.visible(x - reference.per_channel(mean, x), mask)
    inv_std = (total(reference.sum_NS(deviation.square())) / m + ctx.eps).rsqrt()
    x_hat = deviation * reference.per_channel(inv_std, x)
    z = reference.before_activation(x_hat, gamma, beta, residual) if y is None else y
    dz = reference.visible(dy * TABLE[ctx.activation].derivative(z), mask)
    dbeta, dgamma = reference.sum_NS(dz), reference.sum_NS(dz * x_hat)
    of_z, of_x_hat = total(torch.cat([dbeta, dgamma])).chunk(2)
    scale = inv_std if gamma is None else inv_std * gamma
    coupled = reference.per_channel(of_z / m, x) + x_hat * reference.per_channel(of_x_hat / m, x)
    dx = reference.visible((dz - coupled) * reference.per_channel(scale, x), mask)
    return dx.to(like.dtype), dgamma, dbeta, dz.to(like.dtype) if joined else None


normalize_backward.register_autograd(_second_gradients, setup_context=_remember_backward)
