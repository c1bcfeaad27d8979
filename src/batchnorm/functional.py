"""Batch Normalization as pure functions of tensors; running averages are the layers' business."""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.kernels import ops, reference
from batchnorm.kernels.activations import TABLE, check_activation
from batchnorm.moments import Moments, check_mask

ACTIVATIONS: tuple[str, ...] = tuple(name for name in TABLE if name != "identity")
"""Names that ``activation`` takes; slopes and constants are those of `torch.nn`'s defaults."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    channel_dim: int = 1,
) -> tuple[Tensor, Moments]:
    """Normalize each channel by the moments of this batch, scale, shift, add, activate.

    ``y = activation(weight · (x − mean) / sqrt(var + eps) + bias + residual)``, with gradients
    through the moments. Twice differentiable; works under `torch.compile`, `torch.func`
    transforms and autocast.

    Args:
        x: Shape (N, C, *spatial), or (N, *spatial, C) with ``channel_dim=-1``; floating point.
            Contiguous, channels-last or strided; the result keeps the layout.
        weight: γ, shape (C,); ones when ``None``.
        bias: β, shape (C,); zeros when ``None``.
        eps: Added to the variance (squared units of ``x``), not to the deviation.
        activation: One of `ACTIVATIONS`, or ``None``.
        residual: Shape of ``x``; added before the activation.
        mask: Boolean, the shape of ``x`` without channels; true where a sample counts. The
            others (padding) take no part in the moments; their output and gradients are zero.
        channel_dim: 1, or -1 where the features sit last, as a ``Linear`` leaves them.

    Returns:
        ``y`` with the shape and dtype of ``x``, and the biased batch moments in float32 or
        wider (not differentiable). An empty batch gives an empty ``y`` and count 0.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``weight`` or ``bias`` does not have C entries, a channel has a single
            sample, ``eps`` is negative, ``activation`` is unknown, or ``residual`` or
            ``mask`` has another shape.

    Source: Ioffe & Szegedy (2015), Algorithm 1.
    """
    name = _check(x, weight, bias, eps, activation, residual, mask, channel_dim)
    num_values = x.numel() // x.shape[channel_dim] if x.numel() else 0
    if num_values == 1:
        raise ValueError(
            f"a batch must hold more than one value per channel to be normalized by its own moments; "
            f"input of shape {tuple(x.shape)} holds one (use a larger batch, drop the last one of an "
            f"epoch, or normalize with running statistics)"
        )
    if channel_dim == -1:
        flat, shape = _rows, x.shape
        residual = None if residual is None else flat(residual)
        mask = None if mask is None else mask.reshape(-1)
        y, moments = _normalize(flat(x), weight, bias, residual, mask, eps, name)
        return y.reshape(shape), moments
    return _normalize(x, weight, bias, residual, mask, eps, name)


def normalize_with(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    channel_dim: int = 1,
) -> Tensor:
    """The transform with given statistics: what a batch-normalized layer does at inference.

    Args:
        x: As in `batch_norm`.
        mean: Population mean, shape (C,).
        var: Population variance, shape (C,).
        weight: As in `batch_norm`; so are ``bias`` and the keyword arguments.

    Returns:
        ``y`` with the shape and dtype of ``x``; differentiable in ``x``, weight, bias and residual.

    Raises:
        TypeError, ValueError: As `batch_norm`; a single sample per channel is fine here.

    Source: Ioffe & Szegedy (2015), Algorithm 2, line 11.
    """
    name = _check(x, weight, bias, eps, activation, residual, mask, channel_dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = _rows(x) if channel_dim == -1 else x
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    y = F.batch_norm(rows, mean.to(wide), var.to(wide), weight, bias, False, 0.0, eps)
    return _finish(y.reshape(x.shape), residual, mask, name, channel_dim)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _finish(
    y: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str, channel_dim: int
) -> Tensor:
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = TABLE[activation].value(y)
    return y if mask is None else torch.where(mask.unsqueeze(channel_dim), y, 0)


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Moments]:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # vmap, jvp and their compositions go through plain operations, which they all know.
        y, moments = reference.forward(x, weight, bias, residual, mask, eps, activation)
        return y, Moments(moments.mean.detach(), moments.var.detach(), moments.count)
    if mask is None and x.numel():
        return _torch_normalize(x, weight, bias, residual, eps, activation)
    y, mean, var, count = ops.normalize(x, weight, bias, residual, mask, eps, activation)
    return y, Moments(mean, var, count if mask is not None else 0)


def _torch_normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Moments]:
    """PyTorch's own kernel, which has no mask; it hands out moments only as running averages."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (t if t is None else t.to(wide) for t in (weight, bias))
    mean, unbiased = x.new_zeros(x.shape[1], dtype=wide), x.new_zeros(x.shape[1], dtype=wide)
    y = F.batch_norm(x, mean, unbiased, weight, bias, True, 1.0, eps)
    count = x.numel() // x.shape[1]
    return _finish(y, residual, None, activation, 1), Moments(mean, unbiased * ((count - 1) / count), count)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
) -> str:
    if not x.is_floating_point():
        raise TypeError(
            f"batch normalization needs floating-point input, got {x.dtype}: convert it, e.g. x.float()"
        )
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 or -1 (features last), got {channel_dim}")
    if x.dim() < 2:
        raise ValueError(f"input must have a batch and a channel dimension, got shape {tuple(x.shape)}")
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    num_channels = x.shape[channel_dim]
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != (num_channels,):
            raise ValueError(
                f"{name} must have one entry per channel, ({num_channels},) for input of shape "
                f"{tuple(x.shape)} with channels in dimension {channel_dim}, got {tuple(vector.shape)}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of the input, {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if mask is not None:
        check_mask(mask, x, channel_dim)
    return check_activation(activation)
