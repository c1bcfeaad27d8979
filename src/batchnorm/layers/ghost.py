"""Layers that normalize each virtual batch, a part of the batch, by its own moments."""

from typing import Any, ClassVar

from torch import Tensor

from batchnorm.functional.ghost import by_ghosts, check_ghost_size, pooled
from batchnorm.layers import recompute
from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormPerActivation
from batchnorm.layers.variation import Variation
from batchnorm.moments import Moments


class Ghost(Variation):
    """What Ghost Batch Normalization adds to the plain layers, whose arguments and state dicts it shares.

    In training, examples are dealt out to N // ``ghost_size`` virtual batches of sizes as equal as can
    be (at least one; `batchnorm.functional.ghost_batch_norm` says which example goes where), and each
    is normalized by its own moments. In evaluation, or when frozen, the layer is the plain one.

    Running statistics move once for a batch, by the moments of all its samples, as of the plain
    layer: inference wants those of the population, whose variance within ghosts alone is too small
    wherever ghosts differ.

    Args:
        args: As of the plain layer.
        ghost_size: Examples in a virtual batch, at least; smaller batches are one virtual batch.
        kwargs: As of the plain layer.

    Raises:
        ValueError: As of the plain layer; ``ghost_size`` is not a positive whole number.

    Source: Hoffer, Hubara & Soudry (2017), arXiv 1705.08741, algorithm 1.
    """

    settings = ("ghost_size",)
    differs: ClassVar = {"training": "every ghost of the batch is normalized by its own moments"}
    check_settings = staticmethod(check_ghost_size)
    ended = "; the batch is normalized as a whole"

    def __init__(self, *args: Any, ghost_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vary(ghost_size=ghost_size)

    def _by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any
    ) -> tuple[Tensor, Moments]:
        y, ghosts = by_ghosts(x, weight, bias, ghost_size=self.ghost_size, **options)
        if recompute.is_active():
            _offer(y, x, weight, bias, ghosts, **options)
        return y, pooled(ghosts)


def _offer(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ghosts: list[Moments],
    *,
    residual: Tensor | None,
    channel_dim: int,
    **options: Any,
) -> None:
    """Where ghosts are channels of views, tell the saver how these views follow from each other."""
    tensors = [t for t in (y, x, residual) if t is not None]
    if len(ghosts) > 1 or not all(t.is_contiguous() for t in tensors) or (channel_dim != 1 and x.dim() > 2):
        return
    number = ghosts[0].mean.shape[0]

    def dealt(t: Tensor) -> Tensor:
        return t.view(-1, number * t.shape[1], *t.shape[2:])

    vectors = [None if v is None else v.repeat(number) for v in (weight, bias)]
    moments = [ghosts[0].mean.flatten(), ghosts[0].var.flatten()]
    joined = None if residual is None else dealt(residual)
    recompute.offer(dealt(y), dealt(x), moments + vectors, residual=joined, channel_dim=1, **options)


class GhostBatchNorm1d(Ghost, BatchNorm1d):
    """`BatchNorm1d` by ghosts of the batch."""


class GhostBatchNorm2d(Ghost, BatchNorm2d):
    """`BatchNorm2d` by ghosts of the batch."""


class GhostBatchNorm3d(Ghost, BatchNorm3d):
    """`BatchNorm3d` by ghosts of the batch."""


class GhostBatchNormPerActivation(Ghost, BatchNormPerActivation):
    """`BatchNormPerActivation` by ghosts of the batch."""


GHOSTS: dict[type[Normalization], type[Ghost]] = {
    BatchNorm1d: GhostBatchNorm1d,
    BatchNorm2d: GhostBatchNorm2d,
    BatchNorm3d: GhostBatchNorm3d,
    BatchNormPerActivation: GhostBatchNormPerActivation,
}
"""The ghost class for each of the plain ones."""
