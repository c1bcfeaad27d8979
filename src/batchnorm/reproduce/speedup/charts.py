"""Figures 2 and 3 from the summary's plain data."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from batchnorm.report import Curve, CurveChart

NAMES = {
    "inception": "Inception",
    "bn-baseline": "BN-Baseline",
    "bn-x5": "BN-x5",
    "bn-x30": "BN-x30",
    "bn-x5-sigmoid": "BN-x5-Sigmoid",
}
COLOURS = {
    "inception": "plain",
    "bn-baseline": "third",
    "bn-x5": "bn",
    "bn-x30": "fourth",
    "bn-x5-sigmoid": "fifth",
}
X, Y = "training steps (batches of 32)", "test accuracy"


def shown_name(name: str) -> str:
    """The paper's name of a network; plain Inception at another rate has the factor with it."""
    base, _, factor = name.partition("-x") if name.startswith("inception-x") else (name, "", "")
    return f"{NAMES[base]}, rate ×{factor}" if factor else NAMES[name]


def accuracy_chart(summary: Mapping[str, Any]) -> CurveChart:
    """Figure 2: test accuracy of the networks against steps."""
    curves = [_curve(name, found) for name, found in summary["networks"].items()]
    return CurveChart(f"{summary['experiment']['data']}: test accuracy", X, Y, curves, log_x=True)


def _curve(name: str, found: Mapping[str, Any]) -> Curve:
    courses = list(found["seeds"].values())
    steps = max((course["steps"] for course in courses), key=len)
    # One that diverged has fewer evaluations.
    runs = np.full((len(courses), len(steps)), np.nan)
    for row, course in zip(runs, courses, strict=True):
        row[: len(course["accuracy"])] = course["accuracy"]
    base = "inception" if name.startswith("inception") else name
    return Curve(shown_name(name), steps, runs, COLOURS[base], dashed=name.startswith("inception-x"))


def rates_chart(summary: Mapping[str, Any]) -> CurveChart:
    """Plain Inception at several rates, one seed."""
    shades = ("#f3b98d", "#e0701f", "#a84d0c", "#6b3006")
    curves = [
        Curve(f"rate {found['rate']:g}", found["steps"], found["accuracy"], shades[index % 4])
        for index, found in enumerate(summary["rates"].values())
        if found["steps"]
    ]
    return CurveChart("Plain Inception at higher rates", X, Y, curves)


def sigmoid_chart(summary: Mapping[str, Any]) -> CurveChart:
    """Sigmoid with BN and without."""
    with_bn = _curve("bn-x5-sigmoid", summary["networks"]["bn-x5-sigmoid"])
    plain = summary["plain_sigmoid"]
    without = Curve("Inception with sigmoid", plain["steps"], plain["accuracy"], "plain")
    return CurveChart("Sigmoid with BN and without", X, Y, [with_bn, without], reference=("chance", 0.1))
