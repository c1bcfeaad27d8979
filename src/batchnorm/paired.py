"""Differences of things that were tried in pairs, with the interval in which their mean lies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist


@dataclass(frozen=True)
class Paired:
    """Differences of pairs, such as two networks from one seed, and what they say about their mean.

    Attributes:
        values: One difference a pair.
        confidence: Of the interval.
    """

    values: tuple[float, ...]
    confidence: float = 0.95

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> "Paired":
        """``first`` less ``second``, pair by pair.

        Raises:
            ValueError: They are not equally many, or none; or ``confidence`` is not between 0 and 1.
        """
        if len(first) != len(second) or not first:
            raise ValueError(
                f"pairs need as many first as second values, at least one; got {len(first)} and {len(second)}"
            )
        _check(confidence)
        return cls(tuple(a - b for a, b in zip(first, second, strict=True)), confidence)

    @property
    def mean(self) -> float:
        """Of the differences."""
        return math.fsum(self.values) / len(self.values)

    @property
    def std(self) -> float:
        """Their unbiased standard deviation; infinite for one pair, of which the spread is unknown."""
        if len(self.values) < 2:
            return math.inf
        mean = self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (len(self.values) - 1))

    @property
    def half_width(self) -> float:
        """The mean ± this is the interval by Student's t, which takes differences for Gaussian."""
        if len(self.values) < 2:
            return math.inf
        return student_t(len(self.values) - 1, self.confidence) * self.std / math.sqrt(len(self.values))

    @property
    def is_told_apart(self) -> bool:
        """Whether zero lies outside the interval."""
        return abs(self.mean) > self.half_width

    def pairs_needed(self, most: int = 10_000) -> int | None:
        """How many pairs would tell this mean from zero if mean and deviation stayed what they are.

        A guess, as both are estimates. None where it is more than ``most``, or the spread is unknown.
        """
        if len(self.values) < 2 or self.mean == 0:
            return None
        # As many as a Gaussian would need; Student's t is larger, and little so for many.
        deviations = NormalDist().inv_cdf((1 + self.confidence) / 2) * self.std / abs(self.mean)
        needed = 2 if deviations**2 < 2 else int(min(deviations**2, most + 1.0))
        while needed <= most:
            if student_t(needed - 1, self.confidence) * self.std < abs(self.mean) * math.sqrt(needed):
                return needed
            needed += 1
        return None


@lru_cache(maxsize=256)
def student_t(degrees: int, confidence: float) -> float:
    """The t for which a Student variable lies within ±t with probability ``confidence``.

    Args:
        degrees: Of freedom, at least 1.
        confidence: Between 0 and 1.

    Raises:
        ValueError: An argument is out of range.

    Source: Abramowitz & Stegun (1964), 26.7.3 and 26.7.4, inverted by bisection.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom must be at least 1, got {degrees}")
    _check(confidence)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < confidence else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """Probability of being within ±t, where t = tan(angle)·sqrt(degrees)."""
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
