"""What the report draws, from the summary's plain data."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from batchnorm.report import COLOURS, Curve, CurveChart
from batchnorm.reproduce.adaptation.job import BLENDED
from batchnorm.reproduce.adaptation.summary import over_targets


def size_chart(summary: Mapping[str, Any], source: str) -> CurveChart:
    """Accuracy by the number of examples, averaged over targets that have a network of their own."""
    sizes = summary["experiment"]["examples"]
    curves = []
    for method, few, colour in (("statistics", [], "bn"), ("blended", [BLENDED], "third")):
        at = [*few, *sizes]
        runs = np.array([over_targets(summary, source, f"{method} {size}") for size in at]).T
        curves.append(Curve(method, np.array(at, dtype=float), runs, COLOURS[colour]))
    ends = np.array([BLENDED, sizes[-1]], dtype=float)
    for name, what, colour in (("not adapted", "before", "plain"), ("trained there", "there", "fifth")):
        value = np.array(over_targets(summary, source, what))
        curves.append(Curve(name, ends, np.stack([value, value], 1), COLOURS[colour], True))
    num = sum(of["there"] is not None for of in summary["targets"][source].values())
    title = f"Trained on {source}: accuracy in other domains, mean over {num} of them"
    return CurveChart(title, "examples", "accuracy", curves, spread="std", log_x=True)
