"""Algorithm 1 of the paper and its gradient, written to be read.

Plain tensor operations in the order of the paper's equations. Every other kernel is judged
against this one, and whatever no faster kernel can do (masks, function transforms) runs here.

Shapes: N batch, C channels, S all locations. ``x_NCS`` has shape (N, C, *spatial); vectors
of channels are viewed as (1, C, 1, …) by `per_channel`.
"""

from typing import overload

import torch
from torch import Tensor

from batchnorm.kernels.activations import TABLE
from batchnorm.kernels.contract import Gradients
from batchnorm.moments import Moments


def per_channel(v_C: Tensor, x_NCS: Tensor) -> Tensor:
    """A vector of channels, viewed so that it broadcasts over batch and locations."""
    return v_C.reshape([1, -1] + [1] * (x_NCS.dim() - 2))


def sum_NS(t_NCS: Tensor) -> Tensor:
    """The sum over batch and locations, shape (C,)."""
    return t_NCS.sum([d for d in range(t_NCS.dim()) if d != 1])


def refuses(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> str:
    """Nothing is refused: plain tensor operations run everywhere."""
    return ""


def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Moments]:
    """Normalize by the moments of this batch, scale, shift, add, activate.

    Args:
        x: Shape (N, C, *spatial), floating point.
        gamma: Scale, shape (C,), or ``None`` for ones.
        beta: Shift, shape (C,), or ``None`` for zeros.
        residual: Added before the activation, shape of ``x``.
        mask: Boolean, shape (N, *spatial): samples that count. Others give zeros.
        eps: Added to the variance.
        activation: A name in `TABLE`.

    Returns:
        ``y`` with shape and dtype of ``x``, and the biased moments in float32 or wider.

    Source: Ioffe & Szegedy (2015), Algorithm 1.
    """
    moments = Moments.of(x, mask=mask)
    mean, var = moments.mean, moments.var
    return apply(x, mean, var, gamma, beta, residual, mask, eps, activation), moments


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    """The biased moments of this batch, in float32 or wider."""
    return Moments.of(x, mask=mask)


def apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """The transform with given statistics; differentiable in all of its tensors."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shown, residual = visible(x.to(wide), mask), visible(residual, mask)
    x_hat = (shown - per_channel(mean, x)) * per_channel((var + eps).rsqrt(), x)
    z = before_activation(x_hat, gamma, beta, residual)
    return visible(TABLE[activation].value(z), mask).to(x.dtype)


@overload
def visible(t_NCS: Tensor, mask: Tensor | None) -> Tensor: ...
@overload
def visible(t_NCS: None, mask: Tensor | None) -> None: ...
def visible(t_NCS: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """``t_NCS``, with zeros where ``mask`` is false."""
    # What the mask hides may hold anything, NaN included; 0 · NaN must not reach a sum.
    return t_NCS if t_NCS is None or mask is None else torch.where(mask.unsqueeze(1), t_NCS, 0)


@overload
def widened(t_NCS: Tensor, mask: Tensor | None) -> Tensor: ...
@overload
def widened(t_NCS: None, mask: Tensor | None) -> None: ...
def widened(t_NCS: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """`visible` in float32 or wider."""
    return None if t_NCS is None else visible(t_NCS.to(torch.promote_types(t_NCS.dtype, torch.float32)), mask)


def before_activation(
    x_hat: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None
) -> Tensor:
    """What the activation is applied to."""
    z = x_hat
    if gamma is not None:
        z = per_channel(gamma, z) * z
    if beta is not None:
        z = z + per_channel(beta, z)
    if residual is not None:
        z = z + residual
    return z


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    moments: Moments,
    eps: float,
    activation: str,
) -> Gradients:
    """Gradients of a loss ℓ whose gradient in the output of `forward` is ``dy``.

    Args:
        dy: Shape of ``x``.
        x: As in `forward`; so are the arguments not listed here.
        y: What `forward` gave, in place of a residual whose sum's sign it tells (see `contract`).
        moments: What `forward` gave.

    Source: Ioffe & Szegedy (2015), section 3, the six equations below Algorithm 1. They are
    exact also where the mean computed in floating point is not quite the mean.
    """
    like, joined = x, y is not None or residual is not None
    x, dy = widened(x, mask), widened(dy, mask)
    residual, y = widened(residual, mask), widened(y, mask)

    m = moments.count.clamp(min=1) if isinstance(moments.count, Tensor) else max(moments.count, 1)
    deviation = visible(x - per_channel(moments.mean, x), mask)
    inv_std = (moments.var + eps).rsqrt()
    x_hat = deviation * per_channel(inv_std, x)

    z = before_activation(x_hat, gamma, beta, residual) if y is None else y
    dz = dy * TABLE[activation].derivative(z)

    dx_hat = dz if gamma is None else dz * per_channel(gamma, dz)
    dvar = sum_NS(dx_hat * deviation) * (-0.5) * inv_std**3
    dmean = -sum_NS(dx_hat) * inv_std + dvar * sum_NS(-2 * deviation) / m
    dx = (
        dx_hat * per_channel(inv_std, x)
        + per_channel(dvar, x) * 2 * deviation / m
        + per_channel(dmean, x) / m
    )
    dx = visible(dx, mask).to(like.dtype)
    return dx, sum_NS(dz * x_hat), sum_NS(dz), dz.to(like.dtype) if joined else None


def apply_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Gradients:
    """Gradients of `apply` with its statistics held constant; differentiable itself."""
    like, joined = x, y is not None or residual is not None
    x, dy = widened(x, mask), widened(dy, mask)
    residual, y = widened(residual, mask), widened(y, mask)
    inv_std = per_channel((var + eps).rsqrt(), x)
    x_hat = visible((x - per_channel(mean, x)) * inv_std, mask)
    z = before_activation(x_hat, gamma, beta, residual) if y is None else y
    dz = dy * TABLE[activation].derivative(z)
    dx = (dz if gamma is None else dz * per_channel(gamma, dz)) * inv_std
    return dx.to(like.dtype), sum_NS(dz * x_hat), sum_NS(dz), dz.to(like.dtype) if joined else None
