"""How far batches differ from each other, and so how well they determine a mean and a variance."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.moments import Moments


@dataclass(frozen=True)
class Spread:
    """Sums over batches from which standard errors follow; batches are the independent units.

    Samples within a batch may depend on each other in any way: the locations of an image do, so
    that a count of pixels would promise far too much. Only the differences *between* batches are
    used, every batch weighing as its count n does in pooled moments.

    Attributes:
        center: What batch means are measured from, shape (C,), float64; any value near them.
        level: What batch variances are measured from, shape (C,); any value near them.
        sums: Over batches, with d = mean − ``center`` and u = variance + d² − ``level``: the sums
            of n²·d, n²·u, n²·d², n²·d·u and n²·u², shape (5, C).
        weight: The sum of n².
        num: Batches that had samples.
    """

    center: Tensor
    level: Tensor
    sums: Tensor
    weight: float
    num: int

    @classmethod
    def of(cls, batches: Sequence[Moments]) -> "Spread":
        """Of the moments of at least one batch, channel by channel, each by itself."""
        means = torch.stack([batch.mean for batch in batches]).double()
        variances = torch.stack([batch.var for batch in batches]).double()
        counts = [int(batch.count) for batch in batches]
        # From one that has samples: the zeros of one that has none may be far from all the others.
        first = max(range(len(counts)), key=lambda i: counts[i] > 0)
        center, level = means[first], variances[first]
        d = means - center
        u = variances + d.square() - level
        squares = [float(count) ** 2 for count in counts]
        weights = torch.tensor(squares, dtype=torch.float64).to(d.device)[:, None]
        # No matrix product: on CUDA that is refused where deterministic algorithms are asked for.
        sums = torch.stack([(weights * t).sum(0) for t in (d, u, d.square(), d * u, u.square())])
        return cls(center, level, sums, sum(squares), sum(count > 0 for count in counts))

    def merge(self, other: "Spread") -> "Spread":
        """Both sets of batches together, in either order (the sums are moved to one center)."""
        if not self.num:
            return other
        if not other.num:
            return self
        moved = other.about(self.center, self.level)
        return Spread(
            self.center, self.level, self.sums + moved.sums, self.weight + moved.weight, self.num + other.num
        )

    def about(self, center: Tensor, level: Tensor) -> "Spread":
        """The same batches, measured from another center and level."""
        d, u, dd, du, uu = self.sums
        # With c and k constant: d becomes d + c, and u becomes u + 2cd + k.
        c = self.center - center
        k = c.square() + self.level - level
        sums = torch.stack(
            [
                d + c * self.weight,
                u + 2 * c * d + k * self.weight,
                dd + 2 * c * d + c.square() * self.weight,
                du + c * u + 2 * c * dd + (2 * c.square() + k) * d + k * c * self.weight,
                uu + 4 * c.square() * dd + k.square() * self.weight + 4 * c * du + 2 * k * u + 4 * c * k * d,
            ]
        )
        return Spread(center, level, sums, self.weight, self.num)

    def all_reduce(self, group: dist.ProcessGroup) -> "Spread":
        """The batches of all ranks together; the same bits on every rank."""
        counts = torch.tensor([self.weight, self.num], dtype=torch.float64, device=self.center.device)
        packed = torch.cat([self.center, self.level, self.sums.flatten(), counts])
        gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, packed, group=group)
        size = self.center.numel()
        parts = []
        for p in gathered:
            center, level, sums, (weight, num) = p.split([size, size, 5 * size, 2])
            parts.append(Spread(center, level, sums.view(5, size), weight.item(), int(num.item())))
        return reduce(Spread.merge, parts)

    def standard_errors(self, pooled: Moments, eps: float) -> tuple[Tensor, Tensor]:
        """How far the mean and the deviation of these batches may be from those of endless ones.

        Both in deviations, ``sqrt(pooled.var + eps)``: the standard error of the mean, and that of
        the deviation (half the relative one of the variance). They hold if the batches are drawn
        independently, as from a shuffled set; batches in a sorted order differ by more than they
        tell. Fewer than two batches tell nothing: infinite.

        Args:
            pooled: Moments of the samples of all these batches.
            eps: The layer's, squared units of the samples.

        Returns:
            Two tensors of shape (C,), float64.

        Source: the variance of a ratio of totals over clusters of unequal sizes: Cochran (1977),
        Sampling Techniques, chapter 9A.
        """
        scale = pooled.var.double() + eps
        if self.num < 2:
            unknown = torch.full_like(scale, torch.inf)
            return unknown, unknown
        around = self.about(pooled.mean.double(), pooled.var.double())
        total = float(pooled.count)
        # A channel that is constant has errors of zero, which rounding may take just below.
        errors = around.sums[[2, 4]].clamp(min=0).mul(self.num / (self.num - 1)).sqrt() / total
        scale = scale.clamp(min=torch.finfo(torch.float64).tiny)
        return errors[0] / scale.sqrt(), errors[1] / (2 * scale)
