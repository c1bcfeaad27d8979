"""The one place where running statistics move."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels import cpu
from batchnorm.moments import Moments


def commit(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    moments: Moments,
    momentum: float | None,
    others: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Move running statistics towards the moments of one batch, in place.

    A batch whose moments are not finite, or that holds fewer than two samples, moves nothing
    and is not counted. Under `torch.vmap` the batches of all lanes are merged into one.

    Args:
        running_mean: Shape (C,).
        running_var: Unbiased variance, shape (C,).
        num_batches_tracked: Batches that moved the statistics, int64, shape ().
        moments: Of the batch.
        momentum: Weight of the batch; ``None`` averages all batches equally.
        others: Further running statistics, with what the batch has of each.
    """
    compiling = torch.compiler.is_compiling()
    in_lanes = not compiling and torch._C._are_functorch_transforms_active()
    if in_lanes:
        moments = _merged_over_lanes(moments, running_mean)
    elif (
        not compiling
        and not others
        and _moves_at_once(running_mean, running_var, num_batches_tracked, moments)
    ):
        samples = int(moments.count)
        if samples > 1:
            batch = (moments.mean, moments.var, samples)
            cpu.move(running_mean, running_var, num_batches_tracked, *batch, momentum)
        return
    mean, var, count = moments.mean, moments.unbiased(), moments.count
    if not isinstance(count, Tensor) and count < 2:
        return
    moving = ((running_mean, mean), (running_var, var), *others)
    # A sum is finite only if all of its terms are.
    probe = sum(new.sum() for _, new in moving)
    if isinstance(count, int) and probe.device.type == "cpu" and not in_lanes and not compiling:
        if not math.isfinite(probe.item()):
            return
        num_batches_tracked += 1
        new_weight = 1 / num_batches_tracked.item() if momentum is None else momentum
        for running, new in moving:
            running.lerp_(new.to(running.dtype), new_weight)
        return
    # The same without looking at a value: a device would have to be waited for.
    sound = probe.isfinite() & (count > 1)
    num_batches_tracked += sound
    share = 1 / num_batches_tracked.clamp(min=1).to(running_mean.dtype) if momentum is None else momentum
    for running, new in moving:
        running.copy_(torch.where(sound, torch.lerp(running, new.to(running.dtype), share), running))


def _moves_at_once(mean: Tensor, var: Tensor, tracked: Tensor, moments: Moments) -> bool:
    """Whether the CPU's kernel can do it: plain tensors of one dtype that lie as it reads them."""
    new, dtype = moments.mean, mean.dtype
    return (
        type(new) is type(mean) is type(tracked) is Tensor
        and new.is_cpu
        and mean.is_cpu
        and dtype == var.dtype == new.dtype == moments.var.dtype
        and mean.is_contiguous()
        and var.is_contiguous()
        and not mean.is_inference()
        and torch._C._get_tracing_state() is None
        and not cpu.missing()
    )


def _merged_over_lanes(moments: Moments, running: Tensor) -> Moments:
    count = torch.as_tensor(moments.count, device=moments.mean.device)
    return Moments(*_MergeLanes.apply(moments.mean, moments.var, count, running))


class _MergeLanes(torch.autograd.Function):
    """The identity, but for `torch.vmap`: lanes that share one running average become one batch."""

    @staticmethod
    def forward(mean: Tensor, var: Tensor, count: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return mean.clone(), var.clone(), count.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, None, None]:
        return None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Any, Any]:
        lanes = [
            t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)
            for t, dim in zip(tensors[:3], in_dims, strict=False)
        ]
        running_of_each_lane = in_dims[3] is not None
        if running_of_each_lane or in_dims[0] is None:
            return _MergeLanes.apply(*lanes, tensors[3]), (0, 0, 0)
        whole = Moments.merged(Moments(*lane) for lane in zip(*lanes, strict=True))
        return _MergeLanes.apply(whole.mean, whole.var, whole.count, tensors[3]), (None, None, None)


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing repeats it.

    The first run has moved the statistics already.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
