"""Charts as plotly figures, in plain dictionaries."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.report.charts import Chart, CurveChart, PercentileChart, colour, translucent
from batchnorm.report.page import Figure

_BAND_OPACITY = 0.18


def plot(chart: Chart) -> dict[str, Any]:
    """A plotly figure (``{"data": …, "layout": …}``) of ``chart``, for a `Figure` on a page.

    The page gives it fonts and the colours of axes, which follow the reader's light or dark mode.
    """
    return _curves(chart) if isinstance(chart, CurveChart) else _percentiles(chart)


def figure_of(title: str, chart: Chart) -> Figure:
    """``chart`` for a page, which has its own heading for each plot."""
    return Figure(title, "", plot(replace(chart, title="")))


def _curves(chart: CurveChart) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for curve in chart.curves:
        middle, low, high = curve.summary(chart.spread)
        same: dict[str, Any] = {"x": curve.x, "type": "scatter", "mode": "lines", "legendgroup": curve.name}
        if len(np.asarray(curve.runs)) > 1:
            data += _band(same, low, high, curve.colour)
        dash = "dash" if curve.dashed else "solid"
        line = {"color": colour(curve.colour), "width": 2, "dash": dash}
        data.append({**same, "y": middle, "name": curve.name, "line": line})
    x_axis = _axis(chart.x_label, chart.log_x, [curve.x for curve in chart.curves])
    heights = [curve.runs for curve in chart.curves] if chart.y_range is None else [chart.y_range]
    y_axis = _axis(chart.y_label, chart.log_y, heights)
    if chart.y_range is not None:
        # plotly wants the ends of a logarithmic axis as powers of ten.
        y_axis["range"] = [math.log10(end) if chart.log_y else end for end in chart.y_range]
    layout: dict[str, Any] = {"title": {"text": chart.title}, "xaxis": x_axis, "yaxis": y_axis}
    if chart.reference is not None:
        name, height = chart.reference
        line = {"color": colour("fifth"), "dash": "dot", "width": 1.5}
        # At the end: where trainings start, their curves are a crowd.
        label = {"text": name, "textposition": "end", "font": {"color": colour("fifth")}}
        across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": height, "y1": height}
        layout["shapes"] = [{**across, "line": line, "label": label}]
    return {"data": data, "layout": layout}


def _axis(label: str, logarithmic: bool, values: Sequence[Any]) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": label}, "type": "log" if logarithmic else "linear"}
    if logarithmic:
        # plotly would write 1µ for a millionth, of whatever unit, and crowd the digits between two powers.
        axis["exponentformat"] = "power"
        every = np.concatenate([np.asarray(one, dtype=np.float64).ravel() for one in values])
        there = np.log10(every[np.isfinite(every)])
        decades = np.ptp(there) if there.size else 0.0
        if decades < 6:
            axis["dtick"] = "D2" if decades < 2 else 1
    return axis


def _percentiles(chart: PercentileChart) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"title": {"text": chart.title}, "showlegend": False, "annotations": []}
    width = 1 / len(chart.panels)
    for index, panel in enumerate(chart.panels):
        nth = "" if index == 0 else str(index + 1)
        left, right = index * width, (index + 1) * width - (0.05 if index + 1 < len(chart.panels) else 0)
        values = np.asarray(panel.values)
        same: dict[str, Any] = {"x": panel.x, "type": "scatter", "mode": "lines"}
        same |= {"xaxis": f"x{nth}", "yaxis": f"y{nth}"}
        data += _band(same, values[:, 0], values[:, -1], panel.colour)
        for p, level in enumerate(panel.levels):
            line = {"color": colour(panel.colour), "width": 2 if level == 50 else 1}
            data.append({**same, "y": values[:, p], "name": f"{level:g}th percentile", "line": line})
        layout[f"xaxis{nth}"] = {
            "title": {"text": chart.x_label},
            "domain": [left, right],
            "anchor": f"y{nth}",
        }
        layout[f"yaxis{nth}"] = {"anchor": f"x{nth}"}
        if index == 0:
            layout["yaxis"]["title"] = {"text": chart.y_label}
        else:
            layout[f"yaxis{nth}"] |= {"matches": "y", "showticklabels": False}
        above = {"text": panel.name, "x": (left + right) / 2, "y": 1.02, "xref": "paper", "yref": "paper"}
        layout["annotations"].append({**above, "xanchor": "center", "yanchor": "bottom", "showarrow": False})
    return {"data": data, "layout": layout}


def _band(same: dict[str, Any], low: Any, high: Any, name: str) -> list[dict[str, Any]]:
    red, green, blue, opacity = translucent(name, _BAND_OPACITY)
    fill = f"rgba({red * 255:.0f},{green * 255:.0f},{blue * 255:.0f},{opacity})"
    edge = {**same, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [{**edge, "y": low}, {**edge, "y": high, "fill": "tonexty", "fillcolor": fill}]
