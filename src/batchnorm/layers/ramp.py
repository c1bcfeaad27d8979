"""A setting that changes along a straight line while a network trains."""

import math
from dataclasses import dataclass
from typing import overload

from torch import Tensor


@dataclass(frozen=True)
class Ramp:
    """``start`` up to one step, ``end`` from another on, and the straight line between.

    Args:
        start: Value at the beginning.
        end: Value at the end.
        first: The last step with ``start``, 0 or more.
        last: The first step with ``end``, after ``first``.

    Raises:
        ValueError: A value is not finite, or the steps are not in order.
    """

    start: float
    end: float
    first: int
    last: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"start and end of a Ramp must be finite, got {self.start} and {self.end}")
        if not 0 <= self.first < self.last:
            raise ValueError(f"a Ramp needs 0 <= first < last, got first={self.first}, last={self.last}")

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: int | Tensor) -> float | Tensor:
        """The value at a step, which may be a tensor of shape ()."""
        share = (step - self.first) / (self.last - self.first)
        share = share.clamp(0, 1) if isinstance(share, Tensor) else min(max(share, 0.0), 1.0)
        return self.start + (self.end - self.start) * share
