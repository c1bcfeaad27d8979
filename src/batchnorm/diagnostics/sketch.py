"""Percentiles of a long stream in little memory, with a bound on how wrong they can be."""

import copy
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.99
"""Of the bounds on errors that the recorder states, for each percentile of each unit by itself."""

_SHRINK = 2 / 3
"""Each level may hold so much of what the one above it may: the heaviest samples matter most."""


class Sketch:
    """Percentiles of all samples of U units that were ever shown, from at most ``size`` of each.

    Samples lie on levels; one on level h stands for 2**h that were shown. Where all levels together
    hold too many, one is sorted, and every second of its samples moves up a level, from the first
    or the second on as a coin falls.

    *Error.* Let R(v) be how many of the samples shown are at most v, and R'(v) the same for what is
    held, by weight. Halving a level of weight w changes R'(v) by 0 or ±w: by 0 where an even number
    of its samples are at most v, else by +w or −w, as the coin falls. Hence

    - always: |R' − R| is at most the sum of w over all halvings, whatever the stream;
    - with probability 1 − δ over the coins, for a v that does not depend on them:
      |R' − R| ≤ sqrt(2 ln(2/δ) · the sum of w² over all halvings) (Azuma and Hoeffding: the
      differences have mean zero given the coins before, and are bounded by w).

    The sketch keeps both sums, so `rank_error` is no estimate: it is the bound for what happened to
    this very stream. All units are halved together and share their coins, so percentiles over all
    units together have the same bound, relative to their number.

    Infinite samples are the largest and smallest; nans are counted and left out of the percentiles.
    The coins follow from the seed: the same calls give the same bits.

    Attributes:
        num_units: U.
        size: Most samples of a unit that are held between calls.
        count: Samples of a unit that were shown, nans included.
        num_nan: How many of them were nan, shape (U,).
        seeds: Of all sketches that were merged into this one.

    Args:
        num_units: U.
        size: At least 64. With 768 the bound at 99 % is about 0.01, from 10 thousand to a million samples.
        seed: Of the coins. Sketches that are to be merged need different ones.

    Source: Karnin, Lang & Liberty (2016), with compactors emptied only where memory demands it, and
    the bound taken from the halvings that happened.
    """

    def __init__(self, num_units: int, *, size: int = 768, seed: int = 0) -> None:
        if num_units < 0 or size < 64:
            raise ValueError(
                f"a sketch needs num_units of 0 or more and size of 64 or more, got {num_units} and {size}"
            )
        self.num_units, self.size, self.seeds = num_units, size, frozenset({seed})
        self.count = 0
        self.num_nan = np.zeros(num_units, dtype=np.int64)
        self._lowest, self._highest = (np.full(num_units, np.nan) for _ in range(2))
        self._levels: list[NDArray[Any]] = [np.empty((num_units, 0), dtype=np.float32)]
        self._coins = np.random.default_rng(seed)
        self._sum_weights = self._sum_squares = 0

    def update(self, rows: NDArray[Any]) -> None:
        """Show samples, shape (S, U), float32 or float64.

        Raises:
            ValueError: Another number of units.
        """
        if rows.ndim != 2 or rows.shape[1] != self.num_units:
            raise ValueError(
                f"this sketch is of {self.num_units} units and takes (S, {self.num_units}), got {rows.shape}"
            )
        if not len(rows):
            return
        self.count += len(rows)
        self.num_nan += np.isnan(rows).sum(0)
        self._lowest = np.fmin(self._lowest, np.fmin.reduce(rows, axis=0))
        self._highest = np.fmax(self._highest, np.fmax.reduce(rows, axis=0))
        self._levels[0] = np.concatenate([self._levels[0], rows.T], axis=1)
        self._make_room()

    def merge(self, other: "Sketch") -> "Sketch":
        """A sketch of both streams; its bound covers both histories.

        Raises:
            ValueError: Another number of units or size, or a seed that both have.
        """
        if (self.num_units, self.size) != (other.num_units, other.size):
            raise ValueError(
                f"sketches merge where they have the same units and size, got {self.num_units} units of "
                f"{self.size} samples and {other.num_units} of {other.size}"
            )
        if self.seeds & other.seeds:
            raise ValueError(
                f"both sketches tossed the coins of seed {min(self.seeds & other.seeds)}, so that their "
                "errors might add up: give each stream (each rank, each run) a seed of its own"
            )
        whole = copy.deepcopy(self)
        whole.seeds = self.seeds | other.seeds
        whole.count += other.count
        whole.num_nan = self.num_nan + other.num_nan
        whole._lowest = np.fmin(self._lowest, other._lowest)
        whole._highest = np.fmax(self._highest, other._highest)
        whole._sum_weights += other._sum_weights
        whole._sum_squares += other._sum_squares
        for h, held in enumerate(other._levels):
            if h == len(whole._levels):
                whole._levels.append(held[:, :0])
            whole._levels[h] = np.concatenate([whole._levels[h], held], axis=1)
        whole._make_room()
        return whole

    def percentiles(self, levels: Sequence[float]) -> NDArray[np.float64]:
        """Of each unit, shape (P, U); nan for a unit without samples other than nan.

        For a level p of n samples, a sample v that was shown: at least p/100·n samples are at most
        v, and fewer than that are below it, each up to `rank_error`·n. Levels 0 and 100 are exact.
        """
        held, weights = self._held()
        order = np.argsort(held, axis=1)  # nans come last
        return _at(
            np.take_along_axis(held, order, axis=1),
            weights[order].cumsum(axis=1),
            levels,
            count=self.count - self.num_nan,
            lowest=self._lowest,
            highest=self._highest,
        )

    def pooled(self, levels: Sequence[float]) -> NDArray[np.float64]:
        """Over the samples of all units together, shape (P,)."""
        held, weights = self._held()
        flat = held.reshape(1, -1)
        order = np.argsort(flat, axis=1)
        return _at(
            flat[0, order],
            np.tile(weights, self.num_units)[order].cumsum(axis=1),
            levels,
            count=np.array([self.count * self.num_units - self.num_nan.sum()]),
            lowest=np.fmin.reduce(self._lowest, keepdims=True, initial=np.nan),
            highest=np.fmax.reduce(self._highest, keepdims=True, initial=np.nan),
        )[:, 0]

    def rank_error(self, confidence: float | None = CONFIDENCE) -> float:
        """Bound on |R' − R| as a share of the samples shown; 0 as long as all of them are held.

        Args:
            confidence: Probability over the coins with which it holds for one percentile of one
                unit, or ``None`` for the bound that always holds.

        Raises:
            ValueError: ``confidence`` is not between 0 and 1.
        """
        bound = float(self._sum_weights)
        if confidence is not None:
            bound = min(bound, math.sqrt(2 * _log_odds(confidence) * self._sum_squares))
        return bound / max(self.count, 1)

    def _held(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        weights = np.repeat(2 ** np.arange(len(self._levels)), [held.shape[1] for held in self._levels])
        return np.concatenate(self._levels, axis=1), weights

    def _make_room(self) -> None:
        while sum(held.shape[1] for held in self._levels) > self.size:
            top = len(self._levels) - 1
            room = (self.size / 3 * _SHRINK ** (top - h) for h in range(top + 1))
            sizes = [held.shape[1] for held in self._levels]
            over = (h for h, share in enumerate(room) if sizes[h] > max(share, 1))
            # Single samples far down have less than one as their share, and may add up to too many.
            several = (h for h, num in enumerate(sizes) if num > 1)
            self._halve(next(chain(over, several)))

    def _halve(self, h: int) -> None:
        if h + 1 == len(self._levels):
            self._levels.append(self._levels[h][:, :0])
        held = self._levels[h]
        even = held.shape[1] // 2 * 2  # an odd one out stays
        moving = np.sort(held[:, :even], axis=1)[:, int(self._coins.integers(2)) :: 2]
        self._levels[h] = held[:, even:].copy()  # not a view, which would keep all of it
        self._levels[h + 1] = np.concatenate([self._levels[h + 1], moving], axis=1)
        self._sum_weights += 2**h
        self._sum_squares += 4**h


def sampling_error(num_samples: int, num_seen: int, confidence: float = CONFIDENCE) -> float:
    """How far a percentile of a sample may be from its level in the whole, as a share of ranks.

    Args:
        num_samples: S, taken one from each of S equal parts of the whole, independently and evenly, or
            a random subset of such.
        num_seen: Size of the whole.
        confidence: Probability with which the bound holds for one percentile of one unit.

    Returns:
        sqrt(ln(2/δ) / (2S)), with δ = 1 − ``confidence``; 0 where all were taken, 1 where none.

    Source: Hoeffding (1963), theorem 2: whether each of the S samples is at most v is a bounded
    independent variable, and their mean is expected to be the share in the whole; theorem 4 for
    subsets, which are drawn without replacement.
    """
    if num_samples >= num_seen:
        return 0.0
    return min(1.0, math.sqrt(_log_odds(confidence) / (2 * num_samples))) if num_samples else 1.0


def _log_odds(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    return math.log(2 / (1 - confidence))


def _at(
    ordered: NDArray[Any],
    ranks: NDArray[np.int64],
    levels: ArrayLike,
    *,
    count: NDArray[np.int64],
    lowest: NDArray[Any],
    highest: NDArray[Any],
) -> NDArray[np.float64]:
    """Percentiles (P, U) of values (U, M) in order whose ranks, counted by weight, are ``ranks``."""
    found = []
    for level in np.asarray(levels, dtype=np.float64):
        wanted = np.ceil(level * count / 100)[:, None]
        value = highest
        if ordered.shape[1]:
            place = (ranks < wanted).sum(axis=1)
            value = np.take_along_axis(ordered, place[:, None], axis=1)[:, 0]
            # Halvings may have left more nans than their share; then the largest of all is surely there.
            value = np.where(np.isnan(value), highest, value)
        found.append(np.where(level <= 0, lowest, np.where(level >= 100, highest, value)))
    return np.array(found, dtype=np.float64).reshape(len(found), len(count))
