"""What is to be drawn, as plain data: `plots` makes pages of it and `pictures` PNG files."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# One colour for one meaning, on the page and in the pictures, legible on light and dark ground.
COLOURS = {"bn": "#2b83d6", "plain": "#e0701f", "third": "#2e9d68", "fourth": "#b65fc4", "fifth": "#8a8f98"}


@dataclass(frozen=True)
class Curve:
    """One quantity over steps, measured by one or several runs.

    Attributes:
        name: For the legend.
        x: Shape (T,).
        runs: Shape (R, T), or (T,) for a single run; nan where a run has no value.
        colour: A key of `COLOURS`, or any CSS hexadecimal colour.
        dashed: Draw a dashed line.

    Raises:
        ValueError: ``runs`` does not fit ``x``, or holds nothing.
    """

    name: str
    x: ArrayLike
    runs: ArrayLike
    colour: str = "bn"
    dashed: bool = False

    def __post_init__(self) -> None:
        x, runs = np.asarray(self.x, dtype=np.float64), np.atleast_2d(np.asarray(self.runs, dtype=np.float64))
        if x.ndim != 1 or runs.ndim != 2 or runs.shape[1] != len(x) or not runs.size:
            raise ValueError(
                f"curve {self.name!r} needs x of shape (T,) and runs of shape (R, T) or (T,), not empty; "
                f"got {x.shape} and {np.shape(self.runs)}"
            )
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "runs", runs)

    def summary(self, spread: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Middle, lower and upper line, each of shape (T,); nan where no run has a value.

        Args:
            spread: "range" for the median and all that the runs reached; "std" for the mean and
                one (unbiased) standard deviation to either side.
        """
        runs = np.ma.masked_invalid(np.asarray(self.runs))
        if spread == "range":
            lines = np.ma.median(runs, axis=0), runs.min(axis=0), runs.max(axis=0)
        else:
            mean = runs.mean(axis=0)
            # One run has no spread: a band of no width.
            std = np.ma.filled(runs.std(axis=0, ddof=1), 0.0) if len(runs) > 1 else np.zeros(runs.shape[1])
            lines = mean, mean - std, mean + std
        middle, low, high = (np.ma.filled(np.ma.asarray(line, dtype=np.float64), np.nan) for line in lines)
        return middle, low, high


@dataclass(frozen=True)
class CurveChart:
    """Curves with their spread in one system of axes.

    Attributes:
        title: Above the chart; may be empty.
        x_label: With unit.
        y_label: With unit.
        curves: At least one.
        spread: "range" (median, minimum to maximum) or "std" (mean, ± one standard deviation).
        log_x: Logarithmic steps; curves' x must be positive.
        log_y: Logarithmic values; curves' runs must be positive.
        y_range: Limits of the vertical axis, or ``None`` for what the curves need.
        reference: A named horizontal line, such as the paper's figure.

    Raises:
        ValueError: No curves, an unknown spread, or steps or values that have no logarithm.
    """

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    spread: str = "range"
    log_x: bool = False
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    reference: tuple[str, float] | None = None

    def __post_init__(self) -> None:
        if not self.curves:
            raise ValueError(f"chart {self.title!r} has no curves")
        if self.spread not in ("range", "std"):
            raise ValueError(f'chart {self.title!r}: spread must be "range" or "std", got {self.spread!r}')
        if self.log_x and any((np.asarray(curve.x) <= 0).any() for curve in self.curves):
            raise ValueError(f"chart {self.title!r}: a logarithmic axis needs x above zero; leave step 0 out")
        if self.log_y and any((np.asarray(curve.runs) <= 0).any() for curve in self.curves):
            raise ValueError(f"chart {self.title!r}: a logarithmic axis needs values above zero")


@dataclass(frozen=True)
class PercentilePanel:
    """The distribution of one activation over steps.

    Attributes:
        name: Above the panel.
        x: Shape (T,).
        levels: Percentiles' levels, ascending, shape (P,).
        values: Shape (T, P).
        colour: A key of `COLOURS`, or any CSS hexadecimal colour.

    Raises:
        ValueError: The shapes do not fit, or the levels do not ascend.
    """

    name: str
    x: ArrayLike
    levels: Sequence[float]
    values: ArrayLike
    colour: str = "bn"

    def __post_init__(self) -> None:
        x, values = np.asarray(self.x, dtype=np.float64), np.asarray(self.values, dtype=np.float64)
        if values.shape != (len(x), len(self.levels)) or not values.size:
            raise ValueError(
                f"panel {self.name!r} needs values of shape (T, P) = {(len(x), len(self.levels))}, not "
                f"empty; got {values.shape}"
            )
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"panel {self.name!r}: levels must ascend, got {tuple(self.levels)}")
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class PercentileChart:
    """Panels side by side on one vertical scale, as the paper's figure 1 (b, c).

    Attributes:
        title: Above the chart; may be empty.
        x_label: With unit.
        y_label: With unit.
        panels: At least one.

    Raises:
        ValueError: No panels.
    """

    title: str
    x_label: str
    y_label: str
    panels: Sequence[PercentilePanel]

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError(f"chart {self.title!r} has no panels")


Chart = CurveChart | PercentileChart


def colour(name: str) -> str:
    """The hexadecimal colour of a key of `COLOURS`; a hexadecimal colour is handed back.

    Raises:
        ValueError: It is neither.
    """
    found = COLOURS.get(name, name)
    if len(found) != 7 or found[0] != "#" or set(found[1:].lower()) - set("0123456789abcdef"):
        raise ValueError(f"colour must be one of {', '.join(COLOURS)} or like #2b83d6, got {name!r}")
    return found


def translucent(name: str, opacity: float) -> tuple[float, float, float, float]:
    """Red, green, blue and opacity of a colour, each from 0 to 1."""
    digits = colour(name)
    red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue, opacity
