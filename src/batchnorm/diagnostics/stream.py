"""One layer's percentiles over many records: the whole run, or windows of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.diagnostics.sketch import Sketch


@dataclass(frozen=True)
class Window:
    """Percentiles over the records of several steps.

    Attributes:
        first: Step of the first record.
        last: Step of the last record so far.
        count: Samples of each unit.
        percentiles: Of each unit, shape (P, U).
        pooled: Over all these units together, shape (P,).
        error: Bound on the error of their ranks, as a share; see `Sketch.rank_error`.
    """

    first: int
    last: int
    count: int
    percentiles: NDArray[np.float64]
    pooled: NDArray[np.float64]
    error: float


class Stream:
    """Feeds a sketch of the whole run and, where wanted, one of each window.

    Attributes:
        run: Of all records.
    """

    def __init__(self, num_units: int, levels: Sequence[float], *, window: int | None, seed: int) -> None:
        self.run = Sketch(num_units, seed=seed)
        self._levels, self._length, self._seed = tuple(levels), window, seed
        self._closed: list[Window] = []
        self._open = self.run
        self._steps: list[int] = []
        self._last: Window | None = None

    def add(self, step: int, rows: NDArray[Any]) -> None:
        """Show the samples of one record, shape (S, U)."""
        if self._length is not None and len(self._steps) in (0, self._length):
            self._begin()
        self._last = None
        self._steps = [*self._steps, step] if self._length is not None else [*self._steps[:1], step]
        self.run.update(rows)
        if self._open is not self.run:
            self._open.update(rows)

    def windows(self) -> list[Window]:
        """All windows in order; the last may still be growing."""
        if self._steps and self._last is None:  # it takes milliseconds, and may be asked for often
            sketch = self._open
            self._last = Window(
                self._steps[0],
                self._steps[-1],
                sketch.count,
                sketch.percentiles(self._levels),
                sketch.pooled(self._levels),
                sketch.rank_error(),
            )
        return self._closed if self._last is None else [*self._closed, self._last]

    def _begin(self) -> None:
        self._closed = self.windows()
        self._steps, self._open = [], Sketch(self.run.num_units, size=self.run.size, seed=self._seed)
