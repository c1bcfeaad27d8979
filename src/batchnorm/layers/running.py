"""The one place where running statistics move."""

from typing import Any

import torch
from torch import Tensor

from batchnorm.moments import Moments


@torch.no_grad()
def commit(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    moments: Moments,
    momentum: float | None,
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
    """
    moments = _merged_over_lanes(moments, running_mean)
    if not isinstance(moments.count, Tensor) and moments.count < 2:
        return
    mean, var = moments.mean.to(running_mean.dtype), moments.unbiased().to(running_var.dtype)
    # A sum is finite only if all of its terms are; no device has to be waited for.
    sound = (mean.sum() + var.sum()).isfinite()
    if isinstance(moments.count, Tensor):
        sound = sound & (moments.count > 1)
    num_batches_tracked += sound
    new_weight: Tensor | float
    if momentum is None:
        new_weight = 1 / num_batches_tracked.clamp(min=1).to(running_mean.dtype)
    else:
        new_weight = momentum
    for running, new in ((running_mean, mean), (running_var, var)):
        moved = running * (1 - new_weight) + new * new_weight
        running.copy_(torch.where(sound, moved, running))


def _merged_over_lanes(moments: Moments, running: Tensor) -> Moments:
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return moments
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
