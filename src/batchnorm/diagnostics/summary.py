"""Moments and percentiles of one activation, unit by unit, and how far two of them are apart."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchnorm.moments import Moments

# Percentiles over all units together are taken of about so many samples.
_POOLED_SAMPLES = 65_536


@dataclass(frozen=True)
class Samples:
    """What one step has shown of a layer so far.

    Attributes:
        halves: Moments, by unit, of every second example and of the others, float64 on the CPU.
        rows: Some of the samples, shape (S, U), float32 or wider, on the CPU.
        is_second: Which rows come from examples of the second half, shape (S,).
        num_seen: Samples of each unit from which the rows were taken.
        num_nonfinite: Values that are nan or infinite.
    """

    halves: tuple[Moments, Moments]
    rows: NDArray[Any]
    is_second: NDArray[np.bool_]
    num_seen: int
    num_nonfinite: int

    @classmethod
    def of(
        cls, x: Tensor, *, channel_dim: int, mask: Tensor | None, max_samples: int, seed: int = 0
    ) -> "Samples":
        """Moments of all of ``x``, and rows evenly spread over its examples and locations.

        Args:
            x: Floating point, at least two dimensions.
            channel_dim: Where the units are, 1 or -1.
            mask: Boolean, shape of ``x`` without its units; only true places count.
            max_samples: Most rows to take.
            seed: Decides which; the same ones of every tensor of this size.
        """
        # (N, U, L) in every case, and as a view, so that only the chosen rows are copied.
        if channel_dim == -1:
            x = x.movedim(-1, 1)
        x = x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)
        if mask is not None:
            mask = mask.reshape(x.shape[0], x.shape[2])
        halves = [Moments.of(x[i::2], mask=None if mask is None else mask[i::2]) for i in (0, 1)]
        dtype = halves[0].mean.dtype
        packed = torch.stack([t for half in halves for t in (half.mean, half.var)]).cpu().double()
        first, second = (
            Moments(packed[2 * i], packed[2 * i + 1], half.count) for i, half in enumerate(halves)
        )
        if mask is None:
            num_seen = x.shape[0] * x.shape[2]
            places = _spread(num_seen, max_samples, seed)
        else:
            true = mask.flatten().nonzero()[:, 0].cpu().numpy()
            num_seen = len(true)
            places = true[_spread(num_seen, max_samples, seed)]
        example, location = np.divmod(places, max(x.shape[2], 1))
        at = [torch.from_numpy(part).to(x.device) for part in (example, location)]
        # To the CPU whatever the device: a few rows, which numpy sorts several times faster than torch.
        rows = x[at[0], :, at[1]].to(dtype).cpu().numpy()
        # Finite moments have nothing else behind them, and counting takes longer than they did.
        num_nonfinite = 0 if packed.isfinite().all() else _num_nonfinite(x, mask)
        return cls((first, second), rows, example % 2 == 1, num_seen, num_nonfinite)

    @property
    def moments(self) -> Moments:
        """Of all samples, by unit."""
        return self.halves[0].merge(self.halves[1])

    def merge(self, other: "Samples", seed: int = 0) -> "Samples":
        """The samples of two calls of the same layer; rows in proportion to what each has seen."""
        both = (self, other)
        share = min((len(part.rows) / part.num_seen for part in both if part.num_seen), default=1.0)
        chosen = [_subset(len(part.rows), round(share * part.num_seen), seed, 1) for part in both]
        return Samples(
            (self.halves[0].merge(other.halves[0]), self.halves[1].merge(other.halves[1])),
            np.concatenate([part.rows[rows] for part, rows in zip(both, chosen, strict=True)]),
            np.concatenate([part.is_second[rows] for part, rows in zip(both, chosen, strict=True)]),
            self.num_seen + other.num_seen,
            self.num_nonfinite + other.num_nonfinite,
        )


@dataclass(frozen=True)
class Summary:
    """One layer at one step, on the CPU, in float64.

    Attributes:
        mean: Shape (U,).
        var: Biased variance, shape (U,).
        percentiles: Of every unit, shape (P, U).
        pooled: Percentiles over the samples of all units together, shape (P,).
        noise: What `drift` would show between two such summaries of an unchanged network, because
            their examples differ; estimated from the two halves of the examples, nan for a single one.
        num_nonfinite: Values that are nan or infinite.
    """

    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    percentiles: NDArray[np.float64]
    pooled: NDArray[np.float64]
    noise: float
    num_nonfinite: int


def summarize(samples: Samples, levels: Sequence[float], *, standardized: bool = False) -> Summary:
    """Moments, and percentiles at ``levels`` (0 to 100; linear between neighbouring samples).

    Args:
        samples: Of one step.
        levels: Of the percentiles.
        standardized: Whether each batch was normalized by its own moments, so that of the noise
            only that remains which mean and deviation do not explain.
    """
    moments, rows = samples.moments, samples.rows
    mean, var = moments.mean.numpy(), moments.var.numpy()
    num_pooled = max(1, _POOLED_SAMPLES // max(rows.shape[1], 1))
    pooled = rows[_subset(len(rows), num_pooled, 2)].reshape(-1, 1)
    return Summary(
        mean=mean,
        var=var,
        percentiles=_percentiles(rows, levels),
        pooled=_percentiles(pooled, levels)[:, 0],
        noise=_noise(samples, mean, var, levels, standardized),
        num_nonfinite=samples.num_nonfinite,
    )


def drift(before: Summary, after: Summary) -> float:
    """How far the distributions of a layer's units moved between two records, in deviations.

    For every unit u and percentile p: |q_p,u(after) − q_p,u(before)| / σ_u, where σ_u² is the mean
    of the unit's two variances; averaged over percentiles and units. Units that were constant both
    times, and those with values that are not finite, are left out; 0 where no unit is left.
    """
    return _gap(before.percentiles, after.percentiles, before.var, after.var)


def _noise(
    samples: Samples,
    mean: NDArray[np.float64],
    var: NDArray[np.float64],
    levels: Sequence[float],
    standardized: bool,
) -> float:
    # By examples, not by rows: locations of one image are alike, and would agree with each other
    # more than those of two batches do.
    is_second = samples.is_second
    num_second = int(is_second.sum())
    sizes = [len(is_second) - num_second, num_second]
    if not all(sizes):
        return math.nan
    found = [_percentiles(samples.rows[rows], levels) for rows in (~is_second, is_second)]
    if standardized:
        with np.errstate(divide="ignore", invalid="ignore"):  # such units are left out
            for i, half in enumerate(samples.halves):
                found[i] = (found[i] - half.mean.numpy()) * np.sqrt(var / half.var.numpy()) + mean
    # Variances go as 1/size: 1/a + 1/b between the halves, 2 / (a + b) between two whole batches.
    return _gap(found[0], found[1], var, var) * math.sqrt(2 * sizes[0] * sizes[1]) / sum(sizes)


def _gap(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    var_first: NDArray[np.float64],
    var_second: NDArray[np.float64],
) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        moves = (np.abs(second - first) / np.sqrt((var_first + var_second) / 2)).mean(0)
    usable = moves[np.isfinite(moves)]
    return float(usable.mean()) if usable.size else 0.0


def _percentiles(rows: NDArray[Any], levels: Sequence[float]) -> NDArray[np.float64]:
    """Shape (P, U); nan for units with a nan, and without rows."""
    if not len(rows):
        return np.full((len(levels), rows.shape[1]), np.nan)
    ordered = np.sort(rows.T, axis=1)  # nans come last
    below, above, part = _places(len(rows), tuple(levels))
    low, high = ordered[:, below].astype(np.float64), ordered[:, above].astype(np.float64)
    with np.errstate(invalid="ignore"):  # between two infinities
        found = low + (high - low) * part
    found[np.isnan(ordered[:, -1])] = np.nan
    return found.T


@functools.lru_cache
def _places(
    num_rows: int, levels: tuple[float, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    place = np.asarray(levels) / 100 * (num_rows - 1)
    below, above = np.floor(place).astype(int), np.ceil(place).astype(int)
    return below, above, place - below


def _spread(total: int, wanted: int, *seed: int) -> NDArray[np.int64]:
    """One of each of ``wanted`` equal parts of ``range(total)``; all of them if there are no more.

    Which one is drawn for each part by itself, so that whatever pattern the places have, the share
    of any kind of them is expected to be that of the whole: see `sketch.sampling_error`.
    """
    if total <= wanted:
        return np.arange(total)
    within = np.random.default_rng(seed).random(wanted)
    return np.minimum((np.arange(wanted) + within) * (total / max(wanted, 1)), total - 1).astype(np.int64)


def _subset(total: int, wanted: int, *seed: int) -> NDArray[np.int64]:
    """``wanted`` of ``range(total)`` in order, each set of them as likely; all if there are no more.

    For samples of a sample: one of each part, as `_spread` has them, might be the same one twice.
    """
    if total <= wanted:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).permutation(total)[:wanted])


def _num_nonfinite(x: Tensor, mask: Tensor | None) -> int:
    seen = x if mask is None else x.movedim(1, 2)[mask]
    return int((~seen.isfinite()).sum())
