"""Normalization by the moments of a batch, and by given ones."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import cpu, dispatch, eager, native, ops, reference
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
    given: Any = {"activation": activation, "residual": residual, "mask": mask, "channel_dim": channel_dim}
    return batch_norm_by(None, x, weight, bias, eps=eps, **given)


def batch_norm_by(
    known: Moments | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
) -> tuple[Tensor, Moments]:
    """`batch_norm`, which need not look for the moments of the batch where they are known."""
    name = check_arguments(x, weight, bias, eps, activation, residual, mask, channel_dim)
    check_size(x, channel_dim)
    if channel_dim == -1:
        rows, residual, mask = as_rows(x, residual, mask)
        y, moments = _normalize(rows, weight, bias, residual, mask, eps, name, known)
        return y.reshape(x.shape), moments
    return _normalize(x, weight, bias, residual, mask, eps, name, known)


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
    name = check_arguments(x, weight, bias, eps, activation, residual, mask, channel_dim)
    shape = x.shape
    if channel_dim == -1:
        x, residual, mask = as_rows(x, residual, mask)
    if residual is not None:
        residual = residual.to(x.dtype)
    arguments = (x, mean, var, weight, bias, residual, mask, eps, name)
    if x.numel() and dispatch.runs_eagerly(x, mean, var, weight, bias, residual):
        kernel = dispatch.choose(x, weight, bias, residual, mask, name)
        if kernel is not dispatch.KERNELS["torch"]:
            return eager.apply(kernel, *arguments).reshape(shape)
    # PyTorch's operations, which every transform and compiler knows.
    return (native if mask is None else reference).apply(*arguments).reshape(shape)


def check_size(x: Tensor, channel_dim: int) -> None:
    """Raise ``ValueError`` if there is a single value per channel."""
    num_values = x.numel() // x.shape[channel_dim] if x.numel() else 0
    if num_values == 1:
        raise ValueError(
            f"a batch must hold more than one value per channel to be normalized by its own moments; "
            f"input of shape {tuple(x.shape)} holds one (use a larger batch, drop the last one of an "
            f"epoch, or normalize with running statistics)"
        )


def as_rows(
    x: Tensor, residual: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Features that sit last, with what goes with them, as (rows, C)."""
    residual = None if residual is None else residual.reshape(-1, x.shape[-1])
    return x.reshape(-1, x.shape[-1]), residual, None if mask is None else mask.reshape(-1)


def _normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    known: Moments | None,
) -> tuple[Tensor, Moments]:
    if residual is not None:
        residual = residual.to(x.dtype)
    arguments = (x, weight, bias, residual, mask, eps, activation)
    if x.numel() and dispatch.runs_eagerly(x, weight, bias, residual):
        kernel = dispatch.choose(x, weight, bias, residual, mask, activation)
        if kernel is dispatch.KERNELS["torch"]:
            return native.forward(*arguments)
        return eager.normalize(kernel, *arguments, known)
    if dispatch.is_transformed():
        # vmap, jvp and their compositions go through plain operations, which they all know.
        y, moments = reference.forward(*arguments)
        return y, Moments(moments.mean.detach(), moments.var.detach(), moments.count)
    # What a compiler makes of PyTorch's operations is slower than the CPU's kernels; not so on a GPU.
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    fast = compiles and x.is_cpu and x.dtype in cpu.KINDS and cpu.FOUND
    if mask is None and x.numel() and not fast:
        return native.forward(*arguments)
    y, mean, var, count = ops.normalize(*arguments)
    if mask is None:
        count = x.numel() // x.shape[1] if x.numel() else 0
    return y, Moments(mean, var, count)


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
    mask: Tensor | None,
    channel_dim: int,
) -> str:
    """Raise what `batch_norm` says of its arguments; the name of the activation otherwise."""
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
