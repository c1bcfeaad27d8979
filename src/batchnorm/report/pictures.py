"""Charts as PNG files, drawn by matplotlib without its global state."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from batchnorm.files import write_bytes
from batchnorm.report.charts import Chart, CurveChart, PercentileChart, PercentilePanel, colour, translucent

_BAND_OPACITY = 0.18
_INK = "#30343a"


def draw(chart: Chart, path: str | os.PathLike[str], *, size: tuple[float, float] | None = None) -> Path:
    """Write ``chart`` as a PNG file, whole or not at all.

    Args:
        chart: What to draw; `plot` makes the same picture for a page.
        path: Where to.
        size: Width and height in inches, at 150 dots an inch.

    Raises:
        OSError: The file cannot be written.
    """
    num_panels = 1 if isinstance(chart, CurveChart) else len(chart.panels)
    figure = Figure(figsize=size or (3.4 + 3.4 * num_panels, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if isinstance(chart, CurveChart):
        _draw_curves(figure.add_subplot(), chart)
    else:
        _draw_percentiles(figure, chart)
    figure.suptitle(chart.title, color=_INK, fontsize=12)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_bytes(Path(path), picture.getvalue())
    return Path(path)


def _draw_curves(axes: Axes, chart: CurveChart) -> None:
    for curve in chart.curves:
        middle, low, high = curve.summary(chart.spread)
        if len(np.asarray(curve.runs)) > 1:
            axes.fill_between(curve.x, low, high, color=translucent(curve.colour, _BAND_OPACITY), linewidth=0)
        style = "--" if curve.dashed else "-"
        axes.plot(curve.x, middle, style, color=colour(curve.colour), linewidth=1.8, label=curve.name)
    if chart.reference is not None:
        name, height = chart.reference
        axes.axhline(height, color=colour("fifth"), linestyle=":", linewidth=1.3, label=name)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    if chart.y_range is not None:
        axes.set_ylim(*chart.y_range)
    axes.set_ylabel(chart.y_label)
    # Many names would cover the curves.
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    axes.legend(frameon=False, **(beside if len(chart.curves) > 4 else {}))
    _tidy(axes, chart.x_label)


def _draw_percentiles(figure: Figure, chart: PercentileChart) -> None:
    all_axes = figure.subplots(1, len(chart.panels), sharey=True, squeeze=False)[0]
    all_axes[0].set_ylabel(chart.y_label)
    for axes, panel in zip(all_axes, chart.panels, strict=True):
        _draw_panel(axes, panel)
        _tidy(axes, chart.x_label)


def _draw_panel(axes: Axes, panel: PercentilePanel) -> None:
    values = np.asarray(panel.values)
    axes.fill_between(
        panel.x, values[:, 0], values[:, -1], color=translucent(panel.colour, _BAND_OPACITY), linewidth=0
    )
    for p, level in enumerate(panel.levels):
        axes.plot(panel.x, values[:, p], color=colour(panel.colour), linewidth=1.8 if level == 50 else 0.9)
        label = f" {level:g}%"
        axes.annotate(label, (np.asarray(panel.x)[-1], values[-1, p]), va="center", fontsize=8, color=_INK)
    axes.set_title(panel.name, color=_INK, fontsize=10)


def _tidy(axes: Axes, x_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.grid(True, color="#00000014")
    axes.tick_params(colors=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
