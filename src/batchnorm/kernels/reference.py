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
from batchnorm.moments import Moments


def per_channel(v_C: Tensor, x_NCS: Tensor) -> Tensor:
    """A vector of channels, viewed so that it broadcasts over batch and locations."""
    return v_C.reshape([1, -1] + [1] * (x_NCS.dim() - 2))


def _sum_NS(t_NCS: Tensor) -> Tensor:
    return t_NCS.sum([d for d in range(t_NCS.dim()) if d != 1])


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
    wide = torch.promote_types(x.dtype, torch.float32)
    moments = Moments.of(x, mask=mask)
    y = apply(x.to(wide), moments, gamma, beta, residual, mask, eps, activation)
    return y.to(x.dtype), moments


def apply(
    x: Tensor,
    moments: Moments,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """The transform with given moments; differentiable in all of its tensors."""
    x, residual = _visible(x, mask), _visible(residual, mask)
    x_hat = (x - per_channel(moments.mean, x)) * per_channel((moments.var + eps).rsqrt(), x)
    z = _scale_and_shift(x_hat, gamma, beta)
    if residual is not None:
        z = z + residual
    return _visible(TABLE[activation].value(z), mask)


@overload
def _visible(t_NCS: Tensor, mask: Tensor | None) -> Tensor: ...
@overload
def _visible(t_NCS: None, mask: Tensor | None) -> None: ...
def _visible(t_NCS: Tensor | None, mask: Tensor | None) -> Tensor | None:
    # What the mask hides may hold anything, NaN included; 0 · NaN must not reach a sum.
    return t_NCS if t_NCS is None or mask is None else torch.where(mask.unsqueeze(1), t_NCS, 0)


def _scale_and_shift(x_hat: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    z = x_hat
    if gamma is not None:
        z = per_channel(gamma, z) * z
    if beta is not None:
        z = z + per_channel(beta, z)
    return z


def backward(
    dy: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    moments: Moments,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a loss ℓ whose gradient in the output of `forward` is ``dy``.

    Returns:
        ∂ℓ/∂x, ∂ℓ/∂γ, ∂ℓ/∂β in float32 or wider, and ∂ℓ/∂residual, which is also the
        gradient in the value before the activation. All four are always given.

    Source: Ioffe & Szegedy (2015), section 3, the six equations below Algorithm 1. They are
    exact also where the mean computed in floating point is not quite the mean.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x, dy = x.to(wide), dy.to(wide)
    x, dy, residual = _visible(x, mask), _visible(dy, mask), _visible(residual, mask)

    m = moments.count.clamp(min=1) if isinstance(moments.count, Tensor) else max(moments.count, 1)
    deviation = _visible(x - per_channel(moments.mean, x), mask)
    inv_std = (moments.var + eps).rsqrt()
    x_hat = deviation * per_channel(inv_std, x)

    z = _scale_and_shift(x_hat, gamma, beta)
    if residual is not None:
        z = z + residual
    dz = dy * TABLE[activation].derivative(z)

    dx_hat = dz if gamma is None else dz * per_channel(gamma, dz)
    dvar = _sum_NS(dx_hat * deviation) * (-0.5) * inv_std**3
    dmean = -_sum_NS(dx_hat) * inv_std + dvar * _sum_NS(-2 * deviation) / m
    dx = (
        dx_hat * per_channel(inv_std, x)
        + per_channel(dvar, x) * 2 * deviation / m
        + per_channel(dmean, x) / m
    )
    return _visible(dx, mask), _sum_NS(dz * x_hat), _sum_NS(dz), dz
