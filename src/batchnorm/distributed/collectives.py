"""The two collectives of a synchronized layer: one in its forward, one in its backward."""

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.distributed.groups import group_named
from batchnorm.distributed.watchdog import Call, run
from batchnorm.moments import Moments


def gather_moments(local: Moments, group_name: str, place: str) -> Moments:
    """Moments of the samples of all ranks: the same bits on every rank.

    Mean, variance and count travel together, in float64. No device is waited for.

    Args:
        local: Of this rank's samples, shape (C,); none are fine.
        group_name: Of the ranks.
        place: Whose moments: the layer's path in the model, for the watchdog.

    Returns:
        Mean and variance in the dtype of the local ones; the count an int64 tensor on their device.

    Raises:
        ValueError: On the CPU: all ranks together have one sample, and all of them raise. Elsewhere
            the device is told to fail, as no one may wait for its answer.
    """
    C, mean = local.mean.numel(), local.mean
    if isinstance(local.count, Tensor):
        count = local.count.double().reshape(1)
    else:
        # Filled on the device: a number of the host's would have to be copied, and waited for.
        count = mean.new_full((1,), local.count, dtype=torch.float64)
    packed = torch.cat([mean.double(), local.var.double(), count])
    parts_RP = all_gather(packed, group_name, Call("forward", place, C))
    means_RC, vars_RC, counts_R1 = parts_RP.split([C, C, 1], dim=1)
    whole = Moments.pooled(means_RC, vars_RC, counts_R1.squeeze(1))
    _refuse_single(whole.count)
    return Moments(whole.mean.to(mean.dtype), whole.var.to(mean.dtype), whole.count.long())


_SINGLE = (
    "a batch must hold more than one value per channel to be normalized by its own moments; those of all "
    "ranks together hold one (use larger batches, drop the last one of an epoch, or normalize with running "
    "statistics)"
)


def _refuse_single(count: Tensor) -> None:
    # After the collective, so that all ranks find out and none waits for another.
    if not count.is_cpu:
        torch._assert_async(count != 1, _SINGLE)
    elif count.item() == 1:
        raise ValueError(_SINGLE)


def sum_gradients(first: Tensor, second: Tensor, group_name: str, place: str) -> tuple[Tensor, Tensor]:
    """Both sums over all ranks, shape (C,) each, in float64.

    Args:
        first: Of this rank.
        second: Of this rank.
        group_name: Of the ranks.
        place: As in `gather_moments`.
    """
    C = first.numel()
    packed = torch.cat([first.double(), second.double()])
    whole_first, whole_second = all_sum(packed, group_name, Call("backward", place, C)).split([C, C])
    return whole_first, whole_second


# `all_gather_into_tensor` has another name from torch 2.13 on, and warns of the old one.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(packed: Tensor, group_name: str, call: Call) -> Tensor:
    """What every rank packed, shape (ranks, numbers), in one collective."""
    group = group_named(group_name)
    num_ranks = dist.get_world_size(group)
    parts = packed.new_empty(num_ranks * packed.numel())
    run(call, group_name, lambda: _gather(parts, packed, group=group, async_op=True))
    return parts.view(num_ranks, -1)


def all_sum(packed: Tensor, group_name: str, call: Call) -> Tensor:
    """The sum over ranks, in place, in one collective."""
    group = group_named(group_name)
    run(call, group_name, lambda: dist.all_reduce(packed, group=group, async_op=True))
    return packed
