"""Mean, variance and count of a set of samples, and the one law that merges them.

Training, recalibration, ranks and micro-batches all summarize samples as `Moments` and
combine them with `Moments.merge`, so every road to population statistics is the same road.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean, biased variance and count of samples, channel by channel.

    Attributes:
        mean: Shape (C,), float32 or wider.
        var: Biased variance (divided by ``count``), shape (C,), squared units of the samples.
        count: Samples per channel. An ``int`` where it follows from the shape, a tensor of
            shape () where a mask decides it, so that no device has to be waited for.
    """

    mean: Tensor
    var: Tensor
    count: Tensor | int

    @classmethod
    def of(
        cls,
        x: Tensor,
        *,
        channel_dim: int = 1,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Moments":
        """Moments of every channel of ``x``, over all its other dimensions.

        Two passes with a correction: the mean is refined by the mean of what is left after
        subtracting it, and the variance is taken around the refined mean. Nothing is ever
        computed as E[x²] − E[x]², which goes negative where \\|mean\\| ≫ deviation.

        Args:
            x: Floating point, any shape with a channel dimension.
            channel_dim: Where the channels are; 1 or -1 for batches.
            mask: Boolean, the shape of ``x`` without its channel dimension; only samples
                where it is true count.
            dtype: What to compute in; by default float32, or float64 for float64 samples.

        Returns:
            Moments with ``mean`` and ``var`` of shape (C,). No samples give zeros and count 0.

        Raises:
            ValueError: ``mask`` is not boolean or has another shape.

        Source: Chan, Golub & LeVeque (1983), the corrected two-pass algorithm.
        """
        channel_dim %= x.dim()
        around = [d for d in range(x.dim()) if d != channel_dim]
        x = x.to(dtype or torch.promote_types(x.dtype, torch.float32))
        if mask is None:
            count: Tensor | int = x.numel() // x.shape[channel_dim] if x.shape[channel_dim] else 0
            if count == 0:
                return cls(x.new_zeros(x.shape[channel_dim]), x.new_zeros(x.shape[channel_dim]), 0)
            mean = x.mean(around, keepdim=True)
            deviation = x - mean
            correction = deviation.mean(around, keepdim=True)
            var = (deviation - correction).square().mean(around)
        else:
            check_mask(mask, x, channel_dim)
            mask = mask.unsqueeze(channel_dim)
            count = mask.sum()
            divisor = count.clamp(min=1)
            mean = torch.where(mask, x, 0).sum(around, keepdim=True) / divisor
            deviation = torch.where(mask, x - mean, 0)
            correction = deviation.sum(around, keepdim=True) / divisor
            var = torch.where(mask, deviation - correction, 0).square().sum(around) / divisor
        return cls((mean + correction).flatten(), var, count)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of both sample sets together, exact whatever their sizes (0 included).

        Source: Chan, Golub & LeVeque (1983).
        """
        share = self._share_of(other)
        gap = other.mean - self.mean
        within = self.var + (other.var - self.var) * share
        total = self.count + other.count
        return Moments(self.mean + gap * share, within + gap.square() * share * (1 - share), total)

    def _share_of(self, other: "Moments") -> Tensor | float:
        return _ratio(other.count, self.count + other.count, self.mean)

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """All that is known of the samples beside their count: mean and biased variance."""
        return self.mean, self.var

    def flat(self) -> "Moments":
        """Means and variances of any shape as vectors."""
        return replace(self, mean=self.mean.flatten(), var=self.var.flatten())

    def estimates(self) -> tuple[Tensor, ...]:
        """What running statistics hold of the samples: mean and unbiased variance."""
        return self.mean, self.unbiased()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Moments":
        """The same samples with each of the `statistics`, in their order, changed: cast, copied, moved."""
        return replace(self, mean=change(self.mean), var=change(self.var))

    @classmethod
    def merged(cls, parts: Iterable["Moments"]) -> "Moments":
        """All of ``parts`` in one, merged from left to right.

        Raises:
            ValueError: There are no parts.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("Moments.merged needs at least one part; it was given none")
        return reduce(lambda whole, part: whole.merge(part), parts)

    @classmethod
    def pooled(cls, means: Tensor, variances: Tensor, weights: Tensor) -> "Moments":
        """Moments of R sets of samples at once: the law of `merge`, in no order.

        Args:
            means: Shape (R, C).
            variances: Biased, shape (R, C).
            weights: Shape (R,): how many samples each set has. A set of none may be anything finite.

        Returns:
            Moments in the dtype of what is given; the count is the sum of the weights, a tensor.

        Source: Chan, Golub & LeVeque (1983).
        """
        total = weights.sum()
        shares = (weights / total.clamp(min=torch.finfo(weights.dtype).tiny)).unsqueeze(1)
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        return cls(mean, var, total)

    def all_reduce(self, group: Any = None) -> "Moments":
        """Moments of the samples of all ranks, weighted by count; the same bits on every rank.

        Mean, variance and count travel together in one collective, in float64.

        Args:
            group: A process group of `torch.distributed`; the default group when ``None``.
        """
        num_ranks = dist.get_world_size(group)
        count = torch.as_tensor(self.count, dtype=torch.float64, device=self.mean.device)
        packed = torch.cat([*(t.double().flatten() for t in self.statistics), count.reshape(1)])
        gathered = [torch.empty_like(packed) for _ in range(num_ranks)]
        dist.all_gather(gathered, packed, group=group)
        sizes = [t.numel() for t in self.statistics]

        def unpacked(flat: Tensor) -> Moments:
            *parts, counted = flat.split([*sizes, 1])
            shaped = iter([p.view_as(t) for p, t in zip(parts, self.statistics, strict=True)])
            return replace(self.map(lambda _: next(shaped)), count=counted[0])

        return Moments.merged(map(unpacked, gathered)).to(self.mean.dtype)

    def unbiased(self) -> Tensor:
        """Variance divided by ``count − 1``, shape (C,); equal to ``var`` for a single sample."""
        return self.var * self._bessel()

    def _bessel(self) -> Tensor | float:
        return _ratio(self.count, self.count - 1, self.var)

    def to(self, dtype: torch.dtype) -> "Moments":
        """The same moments with mean and variance in ``dtype``."""
        return self.map(lambda t: t.to(dtype))


def _ratio(part: Tensor | int, whole: Tensor | int, like: Tensor) -> Tensor | float:
    # By at least 1, for empty sets. Quotients of integer tensors would be float32, whatever ``like`` is.
    if isinstance(part, Tensor) or isinstance(whole, Tensor):
        part = torch.as_tensor(part, device=like.device).to(like.dtype)
        return part / torch.as_tensor(whole, device=like.device).clamp(min=1).to(like.dtype)
    return part / max(whole, 1)


def check_mask(mask: Tensor, x: Tensor, channel_dim: int = 1) -> None:
    """Raise ``ValueError`` unless ``mask`` is boolean and shaped as ``x`` without its channels."""
    expected = list(x.shape)
    del expected[channel_dim]
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean (true where a sample counts), got {mask.dtype}")
    if list(mask.shape) != expected:
        raise ValueError(
            f"mask must have the shape of the input without its channels, {tuple(expected)} for an "
            f"input of shape {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
