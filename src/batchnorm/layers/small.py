"""Training on small inputs on a CPU, where Python's steps cost more than arithmetic.

A layer of a hundred features is normalized in ten microseconds. So PyTorch's own operations are
called as directly as can be, and the running statistics move in one call.
"""

import torch
from torch import Tensor

from batchnorm.kernels import cpu, dispatch
from batchnorm.kernels.activations import TABLE
from batchnorm.layers import recompute

MOST_ELEMENTS = dispatch.FEW_ELEMENTS
"""Above, fused kernels are faster than PyTorch's operations in spite of what a call of them costs."""

MOST_UNFUSED = 131072
"""The same in evaluation without activation and residual, which PyTorch does in one pass too."""


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor | None:
    """What a layer gives in training; ``None``, and nothing done, where the usual road is needed.

    The running statistics have moved. PyTorch hands out no variance: what moves the running one
    was rounded together with ``eps``, as it is again in every use of it.

    Args:
        x: Shape (N, C, *spatial), on the CPU.
        weight: Shape (C,), or ``None``; so is ``bias``.
        running_mean: Shape (C,); so is ``running_var``.
        num_batches_tracked: Batches that moved them; ``None`` leaves them where they are.
        momentum: Weight of the batch; ``None`` averages all equally.
        eps: Added to the variance.
        activation: A name in `activations.TABLE`, or ``None``.
        residual: Added before the activation, or ``None``.
    """
    size, num_channels = x.numel(), running_mean.numel()
    if not (num_channels < size <= MOST_ELEMENTS):
        return None
    if not _suits(x, weight, bias, running_mean, running_var, residual):
        return None
    y, mean, inv_std = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    if num_batches_tracked is not None:
        running = (running_mean, running_var, num_batches_tracked)
        cpu.move(*running, mean, inv_std, size // num_channels, momentum, inverted_with=eps)
    y = _finish(y, activation, residual)
    if recompute.is_active():
        var = inv_std.square().reciprocal() - eps
        _offer(y, x, [mean, var, weight, bias], eps, activation, residual)
    return y


def normalize_with(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor | None:
    """What a layer gives by its running statistics; ``None`` where the usual road is needed.

    Takes the arguments of `normalize`; the statistics do not move.
    """
    most = MOST_UNFUSED if activation is None and residual is None else MOST_ELEMENTS
    if not (0 < x.numel() <= most) or not _suits(x, weight, bias, mean, var, residual):
        return None
    y = _finish(torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False), activation, residual)
    if recompute.is_active():
        _offer(y, x, [mean, var, weight, bias], eps, activation, residual)
    return y


def _offer(
    y: Tensor,
    x: Tensor,
    vectors: list[Tensor | None],
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    options = {"eps": eps, "activation": activation, "residual": residual, "channel_dim": 1}
    recompute.offer(y, x, vectors, mask=None, **options)


_STATISTICS = {torch.float32: torch.float32, torch.float64: torch.float64, torch.bfloat16: torch.float32}


def _suits(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
) -> bool:
    """Whether all are plain tensors in plain eager execution, and no one asked for anything special."""
    dtype = _STATISTICS.get(x.dtype)
    return (
        dtype is mean.dtype
        and var.dtype is dtype
        and (weight is None or weight.dtype is dtype)
        and (bias is None or bias.dtype is dtype)
        and (residual is None or (residual.shape == x.shape and residual.dtype is x.dtype))
        and mean.is_cpu
        and mean.is_contiguous()
        and var.is_contiguous()
        and not mean.is_inference()
        and dispatch.is_automatic()
        and dispatch.runs_eagerly(x, weight, bias, residual, mean)
        and not cpu.missing()
    )


def _finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    # In place: no gradient needs the output of the normalization itself.
    if residual is not None:
        y = y.add_(residual)
    if activation is None:
        return y
    return y.relu_() if activation == "relu" else TABLE[activation].value(y)
