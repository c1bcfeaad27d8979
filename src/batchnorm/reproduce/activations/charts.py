"""What the report draws, from the summary's plain data."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from batchnorm.report import Curve, CurveChart, PercentileChart, PercentilePanel
from batchnorm.reproduce.activations.job import PERCENTILES
from batchnorm.reproduce.activations.summary import KINDS

NAMES = {"plain": "without BN", "bn": "with BN"}

# From light to dark: low learning rates or early layers to high or late ones.
SHADES = {
    "plain": ("#f3b98d", "#e0701f", "#a84d0c", "#6b3006"),
    "bn": ("#9cc7ef", "#2b83d6", "#14579a", "#0b3257"),
}


def accuracy_charts(summary: Mapping[str, Any]) -> dict[float, CurveChart]:
    """Figure 1(a) for each rate."""
    lowest = 0.9 if summary["steps"][-1] >= 10_000 else 0.0
    return {
        row["rate"]: CurveChart(
            title=f"Test accuracy, learning rate {row['rate']:g}",
            x_label="training steps",
            y_label="test accuracy",
            curves=[Curve(NAMES[k], summary["steps"], row["accuracy"][k], colour=k) for k in KINDS],
            y_range=(lowest, 1.0),
        )
        for row in summary["rates"]
    }


def overview_chart(summary: Mapping[str, Any]) -> CurveChart:
    """All rates in one picture, on logarithmic steps: BN solid, without it dashed."""
    steps = np.array(summary["steps"])
    after = steps > 0
    curves = [
        Curve(
            f"{NAMES[kind]}, rate {row['rate']:g}",
            steps[after],
            np.array(row["accuracy"][kind])[:, after],
            colour=SHADES[kind][index % 4],
            dashed=kind == "plain",
        )
        for kind in ("bn", "plain")
        for index, row in enumerate(summary["rates"])
    ]
    title = f"{summary['experiment']['data']}: test accuracy, median and range of seeds"
    return CurveChart(title, "training steps", "test accuracy", curves, log_x=True, y_range=(0.0, 1.0))


def inputs_chart(summary: Mapping[str, Any]) -> PercentileChart:
    """Figure 1(b, c)."""
    panels = [
        PercentilePanel(NAMES[kind], summary["steps"], PERCENTILES, found["percentiles"], colour=kind)
        for kind, found in summary["distributions"].items()
    ]
    return PercentileChart(
        "Input of a typical sigmoid of the last hidden layer", "training steps", "input", panels
    )


def drift_chart(summary: Mapping[str, Any]) -> CurveChart:
    """Moves of each layer's inputs, per 1,000 steps."""
    steps = np.array(summary["steps"])
    curves = [
        Curve(
            f"layer {layer + 1}, {NAMES[kind]}",
            steps[1:],
            np.maximum(moves, 1e-6),
            colour=SHADES[kind][layer % 4],
            dashed=kind == "plain",
        )
        for kind in KINDS
        for layer, moves in enumerate(summary["distributions"][kind]["drift"])
    ]
    return CurveChart(
        "Drift of sigmoid inputs, mean over units and seeds",
        "training steps",
        "widths per 1,000 steps",
        curves,
        log_x=True,
        log_y=True,
    )
