"""Moments and percentiles of one activation, unit by unit, and how far two of them are apart."""

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


@dataclass
class Samples:
    """What one step has shown of a layer so far.

    Attributes:
        moments: Of all samples, by unit.
        rows: At most ``max_samples`` of them for each call of the layer, shape (S, U), float32 or wider.
        num_nonfinite: Values that are nan or infinite.
    """

    moments: Moments
    rows: Tensor
    num_nonfinite: Tensor

    @classmethod
    def of(cls, x: Tensor, *, channel_dim: int, mask: Tensor | None, max_samples: int) -> "Samples":
        """Moments of all of ``x``, and rows evenly spread over its examples and locations.

        Args:
            x: Floating point, at least two dimensions.
            channel_dim: Where the units are, 1 or -1.
            mask: Boolean, shape of ``x`` without its units; only true places count.
            max_samples: Most rows to keep.
        """
        # (N, U, L) in every case, and as a view, so that only the chosen rows are copied.
        if channel_dim == -1:
            x = x.movedim(-1, 1)
        x = x.unsqueeze(2) if x.dim() == 2 else x.flatten(2)
        if mask is not None:
            mask = mask.reshape(x.shape[0], x.shape[2])
        moments = Moments.of(x, mask=mask)
        if mask is None:
            places = torch.from_numpy(_spread(x.shape[0] * x.shape[2], max_samples)).to(x.device)
        else:
            places = mask.flatten().nonzero()[:, 0]
            places = places[torch.from_numpy(_spread(len(places), max_samples)).to(x.device)]
        locations = max(x.shape[2], 1)
        rows = x[places // locations, :, places % locations].to(moments.mean.dtype)
        seen = x if mask is None else x.movedim(1, 2)[mask]
        return cls(moments, rows, (~seen.isfinite()).sum())

    def merge(self, other: "Samples") -> "Samples":
        """The samples of two calls of the same layer."""
        rows = torch.cat([self.rows, other.rows])
        return Samples(self.moments.merge(other.moments), rows, self.num_nonfinite + other.num_nonfinite)


@dataclass(frozen=True)
class Summary:
    """One layer at one step, on the CPU, in float64.

    Attributes:
        mean: Shape (U,).
        var: Biased variance, shape (U,).
        percentiles: Of every unit, shape (P, U).
        pooled: Percentiles over the samples of all units together, shape (P,).
        noise: What `drift` would show between two such summaries of an unchanged network, from
            sampling alone; estimated from the two halves of the rows.
        num_nonfinite: Values that are nan or infinite.
    """

    mean: NDArray[np.float64]
    var: NDArray[np.float64]
    percentiles: NDArray[np.float64]
    pooled: NDArray[np.float64]
    noise: float
    num_nonfinite: int


def summarize(samples: Samples, levels: Sequence[float]) -> Summary:
    """Moments, and percentiles at ``levels`` (0 to 100; linear between neighbouring samples)."""
    # On the CPU whatever the device: a few rows, which numpy sorts several times faster than torch.
    rows = samples.rows.cpu().numpy()
    mean, var = (values.double().cpu().numpy() for values in (samples.moments.mean, samples.moments.var))
    num_pooled = max(1, _POOLED_SAMPLES // max(rows.shape[1], 1))
    pooled = rows[_spread(len(rows), num_pooled)].reshape(-1, 1)
    first, second = _percentiles(rows[::2], levels), _percentiles(rows[1::2], levels)
    return Summary(
        mean=mean,
        var=var,
        percentiles=_percentiles(rows, levels),
        pooled=_percentiles(pooled, levels)[:, 0],
        # Each half has twice the variance of the whole, hence the root.
        noise=_gap(first, second, var, var) / math.sqrt(2),
        num_nonfinite=int(samples.num_nonfinite),
    )


def drift(before: Summary, after: Summary) -> float:
    """How far the distributions of a layer's units moved between two records, in deviations.

    For every unit u and percentile p: |q_p,u(after) − q_p,u(before)| / σ_u, where σ_u² is the mean
    of the unit's two variances; averaged over percentiles and units. Units that were constant both
    times, and those with values that are not finite, are left out; 0 where no unit is left.
    """
    return _gap(before.percentiles, after.percentiles, before.var, after.var)


def _gap(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    var_first: NDArray[np.float64],
    var_second: NDArray[np.float64],
) -> float:
    std = np.sqrt((var_first + var_second) / 2)
    move = np.abs(second - first)
    usable = (std > 0) & np.isfinite(std) & np.isfinite(move).all(0)
    return float((move[:, usable] / std[usable]).mean()) if usable.any() else 0.0


def _percentiles(rows: NDArray[Any], levels: Sequence[float]) -> NDArray[np.float64]:
    """Shape (P, U); nan for units with a nan, and without rows."""
    if not len(rows):
        return np.full((len(levels), rows.shape[1]), np.nan)
    ordered = np.sort(rows.T, axis=1)  # nans come last
    place = np.asarray(levels) / 100 * (len(rows) - 1)
    below, above = np.floor(place).astype(int), np.ceil(place).astype(int)
    low, high = ordered[:, below].astype(np.float64), ordered[:, above].astype(np.float64)
    with np.errstate(invalid="ignore"):  # between two infinities
        found = low + (high - low) * (place - below)
    found[np.isnan(ordered[:, -1])] = np.nan
    return found.T


def _spread(total: int, wanted: int) -> NDArray[np.int64]:
    """``wanted`` of ``range(total)``, evenly spread; all of them if there are no more."""
    if total <= wanted:
        return np.arange(total)
    # A stride with no common divisor does not keep to the same few columns of an image.
    stride = total // wanted
    while math.gcd(stride, total) > 1:
        stride += 1
    return np.arange(wanted) * stride % total
