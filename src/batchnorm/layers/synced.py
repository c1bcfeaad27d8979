"""Layers that normalize by the batch of several ranks, as if one process had all of it."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from batchnorm import distributed
from batchnorm.layers import recompute
from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormPerActivation
from batchnorm.layers.variation import Variation
from batchnorm.moments import Moments


class Synced(Variation):
    """What synchronized layers add to the plain ones, whose arguments and state dicts they share.

    In training, mean and variance are those of the samples of all ranks, weighted by their counts,
    and gradients go through the moments of all ranks: one collective forward, one backward. All
    ranks of the group have to call the layer equally often, with or without samples. Running
    statistics move alike on every rank.

    Where there is nothing to share, the layer does what the plain one does, without collectives: in
    evaluation, when frozen, with one rank, without a process group, and within
    `batchnorm.distributed.alone`.

    Args:
        args: As of the plain layer.
        group: The process group whose ranks share a batch; all ranks when ``None``.
        group_size: In its place: that many consecutive ranks share a batch. All ranks have to make
            the layer, as the first of a size makes the groups.
        kwargs: As of the plain layer.

    Raises:
        ValueError: As of the plain layer; both ``group`` and ``group_size`` are given, this rank is
            not in the group, or the number of ranks is no multiple of ``group_size``.
    """

    settings = ("group_name", "place")
    ended = "; every rank uses its own batch"

    place: str = ""
    """The layer's path in the model, by which the watchdog calls it."""

    def __init__(
        self, *args: Any, group: dist.ProcessGroup | None = None, group_size: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._vary(group_name=distributed.name_of(group, group_size))

    @property
    def _is_shared(self) -> bool:
        """Whether other processes have a part of the batch."""
        return self.training and not self.frozen and distributed.are_many(self.group_name)

    def _by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> tuple[Tensor, Moments]:
        if not self._is_shared:
            return super()._by_batch(x, weight, bias, **options)
        y, moments = distributed.batch_norm(
            x, weight, bias, group_name=self.group_name, place=self.place, **options
        )
        recompute.offer(y, x, [moments.mean, moments.var, weight, bias], **options)
        return y, moments

    def _is_plain(self, x: Tensor, by_running: bool) -> bool:
        return (by_running or not self._is_shared) and Normalization._is_plain(self, x, by_running)

    @property
    def described(self) -> str:
        """Who shares a batch."""
        over = "all ranks" if self.group_name == distributed.WORLD else f"group {self.group_name}"
        return f"synchronized over {over}"


class SyncedBatchNorm1d(Synced, BatchNorm1d):
    """`BatchNorm1d` by the batch of all ranks."""


class SyncedBatchNorm2d(Synced, BatchNorm2d):
    """`BatchNorm2d` by the batch of all ranks."""


class SyncedBatchNorm3d(Synced, BatchNorm3d):
    """`BatchNorm3d` by the batch of all ranks."""


class SyncedBatchNormPerActivation(Synced, BatchNormPerActivation):
    """`BatchNormPerActivation` by the batch of all ranks."""


SYNCED: dict[type[Normalization], type[Synced]] = {
    BatchNorm1d: SyncedBatchNorm1d,
    BatchNorm2d: SyncedBatchNorm2d,
    BatchNorm3d: SyncedBatchNorm3d,
    BatchNormPerActivation: SyncedBatchNormPerActivation,
}
"""The synchronized class for each of the plain ones."""
