"""Normalization by the moments of a batch, corrected towards given ones."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.functional.plain import as_rows, batch_norm_by, check_arguments
from batchnorm.kernels import dispatch
from batchnorm.moments import Moments


def batch_renorm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    r_max: Tensor | float = 3.0,
    d_max: Tensor | float = 5.0,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Moments]:
    """`batch_norm`, corrected towards what given statistics would make of the batch.

    ``y = activation(weight · (x̂·r + d) + bias + residual)`` with x̂ normalized by the batch, and
    constants through which no gradient flows: r = σ_batch/σ within [1/``r_max``, ``r_max``] and
    d = (μ_batch − μ)/σ within [−``d_max``, ``d_max``]. Within the limits ``y`` is what
    `normalize_with` gives. With ``r_max=1, d_max=0`` it is what `batch_norm` gives, to the bit.

    It is `batch_norm` with weight·r as its weight and bias + weight·d as its bias; all it costs
    more is another look at ``x``, for its moments.

    Args:
        x: As in `batch_norm`.
        mean: μ, shape (C,): a running mean, say. A constant; so is ``var``.
        var: Shape (C,): a running variance, say; σ = sqrt(var + eps).
        weight: As in `batch_norm`; so are the other arguments not listed here.
        r_max: The largest factor, 1 or more; a number or a tensor of shape ().
        d_max: The largest shift, in deviations σ, 0 or more; likewise.

    Returns:
        ``y`` with the shape, dtype and memory layout of ``x``, and the biased batch moments.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: As `batch_norm`; ``mean`` or ``var`` does not have C entries; ``r_max`` or ``d_max``
            is a number out of its range.

    Source: Ioffe (2017), arXiv 1702.03275, algorithm 1.
    """
    check_limits(r_max, d_max)
    check_arguments(x, weight, bias, eps, activation, residual, mask, channel_dim)
    C = x.shape[channel_dim]
    for name, vector in (("mean", mean), ("var", var)):
        if vector.shape != (C,):
            raise ValueError(f"{name} must have one entry per channel, ({C},), got {tuple(vector.shape)}")
    moments = moments_of(x, mask, channel_dim)
    weight, bias = corrected(weight, bias, *correction(moments, mean, var, eps=eps, r_max=r_max, d_max=d_max))
    given: Any = {"activation": activation, "residual": residual, "mask": mask, "channel_dim": channel_dim}
    return batch_norm_by(moments, x, weight, bias, eps=eps, **given)


def moments_of(x: Tensor, mask: Tensor | None, channel_dim: int) -> Moments:
    """The moments that `batch_norm` normalizes by, without gradient."""
    x = x.detach()
    if channel_dim == -1:
        x, _, mask = as_rows(x, None, mask)
    if x.numel() and dispatch.runs_eagerly(x):
        return dispatch.choose(x, None, None, None, mask, "identity").moments(x, mask)
    return Moments.of(x, mask=mask)


def correction(
    moments: Moments,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
    r_max: Tensor | float,
    d_max: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """r and d of `batch_renorm`, shape (C,)."""
    mean, var = mean.detach().to(moments.mean.dtype), var.detach().to(moments.var.dtype)
    inv_std = (var + eps).rsqrt()
    r = (moments.var + eps).sqrt() * inv_std
    d = (moments.mean - mean) * inv_std
    return torch.clamp(r, 1 / r_max, r_max), torch.clamp(d, -d_max, d_max)


def corrected(weight: Tensor | None, bias: Tensor | None, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the bias by which `batch_norm` is `batch_renorm`."""
    shift = d if weight is None else weight * d
    return r if weight is None else weight * r, shift if bias is None else bias + shift


def check_limits(r_max: object, d_max: object) -> None:
    """Raise ``ValueError`` unless a limit makes sense; the values of tensors are not looked at."""
    for name, value, least in (("r_max", r_max, 1), ("d_max", d_max, 0)):
        is_number = isinstance(value, int | float) and least <= value < float("inf")
        if not (is_number or isinstance(value, Tensor)):
            raise ValueError(f"{name} must be a finite number of {least} or more, got {value!r}")
