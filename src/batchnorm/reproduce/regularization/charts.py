"""What the report draws, from the summary's plain data."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from batchnorm.report import Curve, CurveChart
from batchnorm.reproduce.regularization.experiment import KINDS

NAMES = {"bn": "with BN", "plain": "without BN"}
SHADES = {
    "bn": ("#0b3257", "#2b83d6", "#9cc7ef", "#cfe4f7"),
    "plain": ("#6b3006", "#e0701f", "#f3b98d", "#f9dcc7"),
}
"""From no dropout to the most."""
SCORES = {"test": "test accuracy, %", "gap": "training less test accuracy, points"}


def score_chart(summary: Mapping[str, Any], score: str) -> CurveChart:
    """A score of every kind and dropout against the batch size."""
    curves = []
    for kind in KINDS:
        for index, dropout in enumerate(summary["experiment"]["dropouts"]):
            cells = [cell for cell in summary["cells"] if (cell["kind"], cell["dropout"]) == (kind, dropout)]
            values = [cell[score] for cell in cells]
            name = f"{NAMES[kind]}, {'no dropout' if not dropout else f'dropout {dropout:g}'}"
            curves.append(_curve(summary, cells, values, name, SHADES[kind][min(index, 3)], kind == "plain"))
    title = f"{summary['experiment']['data']}: {SCORES[score]}"
    return CurveChart(title, "batch size", SCORES[score], curves, log_x=True)


def gain_chart(summary: Mapping[str, Any]) -> CurveChart:
    """What dropout adds, with and without BN, against the batch size."""
    curves = []
    for kind in KINDS:
        for index, dropout in enumerate(d for d in summary["experiment"]["dropouts"] if d):
            rows = [row for row in summary["dropout"] if row["dropout"] == dropout]
            values = [None if row[kind] is None else row[kind]["values"] for row in rows]
            name = f"dropout {dropout:g}, {NAMES[kind]}"
            shade = SHADES[kind][min(index + 1, 3)]
            curves.append(_curve(summary, rows, values, name, shade, kind == "plain"))
    data = summary["experiment"]["data"]
    label = "test accuracy gained, points"
    title = f"{data}: what dropout adds"
    return CurveChart(title, "batch size", label, curves, log_x=True, reference=("nothing", 0.0))


def _curve(
    summary: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    values: Sequence[Sequence[float] | None],
    name: str,
    shade: str,
    dashed: bool,
) -> Curve:
    """In points of a hundred; a cell without a value, as all its rates diverged, is a gap."""
    missing = [float("nan")] * summary["experiment"]["seeds"]
    runs = 100 * np.array([missing if value is None else value for value in values], dtype=float).T
    order = np.argsort([row["batch_size"] for row in rows])
    sizes = np.array([row["batch_size"] for row in rows])
    return Curve(name, sizes[order], runs[:, order], shade, dashed)
