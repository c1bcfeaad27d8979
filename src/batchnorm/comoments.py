"""Covariances within groups of channels, merged by the law that merges means and variances."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from batchnorm.moments import Moments


@dataclass(frozen=True)
class Comoments(Moments):
    """`Moments` with the covariances of every channel with those of its group.

    Groups are consecutive channels, g of them; the last group has what is left.

    Attributes:
        cov: Biased covariances, shape (C, g): row c holds those of channel c with the channels of
            its group, in their order, and zeros beyond the end of a smaller last group.
    """

    cov: Tensor

    @property
    def statistics(self) -> tuple[Tensor, ...]:
        """Mean, biased variance and biased covariances."""
        return self.mean, self.var, self.cov

    def estimates(self) -> tuple[Tensor, ...]:
        """Mean, unbiased variance and unbiased covariances."""
        return *super().estimates(), self.cov * self._bessel()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Comoments":
        """As `Moments.map`."""
        return Comoments(change(self.mean), change(self.var), self.count, change(self.cov))

    def merge(self, other: Moments) -> "Comoments":
        """Of both sample sets together; ``other`` has covariances too.

        Source: Chan, Golub & LeVeque (1983).
        """
        assert isinstance(other, Comoments)
        both = super().merge(other)
        share = self._share_of(other)
        gap = other.mean - self.mean
        between = gap.unsqueeze(1) * of_group(gap, self.cov.shape[1])
        cov = self.cov + (other.cov - self.cov) * share + between * (share * (1 - share))
        return Comoments(both.mean, both.var, both.count, cov)


def of_group(vector_C: Tensor, group: int) -> Tensor:
    """For every channel the entries of its group, shape (C, g); zeros beyond a smaller last one."""
    num = len(vector_C)
    return blocks_of_rows(vector_C, group).repeat_interleave(group, 0)[:num]


def blocks_of_rows(rows: Tensor, group: int) -> Tensor:
    """(C, …) as (groups, g, …), with zeros beyond the end."""
    missing = -len(rows) % group
    filled = pad(rows, [0, 0] * (rows.dim() - 1) + [0, missing])
    return filled.unflatten(0, (-1, group))


def diagonal(var_C: Tensor, group: int) -> Tensor:
    """Covariances, shape (C, g), of channels with these variances and no correlation."""
    places = torch.arange(len(var_C), device=var_C.device) % group
    return torch.zeros(len(var_C), group, dtype=var_C.dtype, device=var_C.device).scatter(
        1, places.unsqueeze(1), var_C.detach().unsqueeze(1)
    )
