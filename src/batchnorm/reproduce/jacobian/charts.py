"""What the report draws, from the summary's plain data."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from batchnorm.report import Curve, CurveChart
from batchnorm.reproduce.jacobian.experiment import KINDS
from batchnorm.reproduce.jacobian.job import PERCENTILES

NAMES = {"bn": "with BN", "plain": "without BN"}
BN_SHADES = ("#9cc7ef", "#2b83d6", "#0b3257")
PLAIN_SHADES = ("#f3b98d", "#e0701f", "#6b3006")


def headline(summary: Mapping[str, Any], which: str, activation: str, kind: str) -> Mapping[str, Any]:
    """The network from the headline's initial deviation."""
    std = summary["experiment"]["headline_std"]
    networks = summary["networks"][f"{which}/{activation}/{kind}"]
    return next(network for network in networks if network["init_std"] == std)


def spectrum_chart(summary: Mapping[str, Any], activation: str) -> CurveChart:
    """The paper's network: singular values of the last hidden layer, before and after training."""
    curves = []
    for kind, shades in zip(KINDS, (BN_SHADES, PLAIN_SHADES), strict=True):
        points = headline(summary, "paper", activation, kind)["points"]
        for index, point in ((0, points[0]), (2, points[-1])):
            values = np.array(point["singular"]["percentiles"][-1], dtype=float)
            name = f"{NAMES[kind]}, step {point['step']:,}"
            levels = np.array(PERCENTILES, dtype=float)
            curves.append(Curve(name, levels, values, shades[index], kind == "plain"))
    return CurveChart(
        f"{activation}: singular values of the Jacobian to the last hidden layer, the paper's network",
        "percentile",
        "singular value",
        curves,
        reference=("1", 1.0),
    )


def depth_chart(summary: Mapping[str, Any], activation: str) -> CurveChart:
    """The deep network: root mean square of singular values by layer, at each point."""
    curves = []
    for kind, shades in zip(KINDS, (BN_SHADES, PLAIN_SHADES), strict=True):
        for index, point in enumerate(headline(summary, "deep", activation, kind)["points"]):
            values = np.array(point["singular"]["rms"], dtype=float)
            name = f"{NAMES[kind]}, step {point['step']:,}"
            layers = np.arange(2, len(values) + 2)
            curves.append(Curve(name, layers, values, shades[min(index, 2)], kind == "plain"))
    settings = summary["experiment"]
    return CurveChart(
        f"{activation}, {settings['depth']} layers, deviation {settings['headline_std']:g}: singular values",
        "hidden layer",
        "root mean square of singular values",
        curves,
        reference=("1", 1.0),
    )


def gradient_chart(summary: Mapping[str, Any], activation: str) -> CurveChart:
    """The deep network: gradients by layer, with BN at each point, without it at the start."""
    curves = []
    depth, std = summary["experiment"]["depth"], summary["experiment"]["headline_std"]
    last_of_bn = 1.0
    for index, point in enumerate(headline(summary, "deep", activation, "bn")["points"]):
        values = _positive(point["gradient"])
        layers = np.arange(1, len(values) + 1)
        name = f"with BN, from {std:g}, step {point['step']:,}"
        curves.append(Curve(name, layers, values, BN_SHADES[min(index, 2)]))
        last_of_bn = values[-1] if index == 0 else last_of_bn
    layers = np.arange(1, depth + 1)
    growth = summary["growth_at_start"][activation]
    calculated = last_of_bn * growth ** (len(layers) - layers)
    curves.append(Curve(f"calculated: {growth:.3f} a layer", layers, calculated, "#1d2126", True))
    for index, network in enumerate(summary["networks"][f"deep/{activation}/plain"]):
        name = f"without BN, from {network['init_std']:g}, step 0"
        values = _positive(network["points"][0]["gradient"])
        curves.append(Curve(name, layers, values, PLAIN_SHADES[min(index, 2)], True))
    title = f"{activation}, {depth} layers: gradient of the loss in each layer's x̂"
    return CurveChart(title, "hidden layer", "norm of the gradient", curves, log_y=True)


def _positive(values: Any) -> np.ndarray:
    # Below this a curve ends: vanished gradients would flatten all others.
    array = np.array(values, dtype=float)
    return np.where(array > 1e-12, array, np.nan)
