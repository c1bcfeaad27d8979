"""What the report draws, from the summary's plain data."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from batchnorm.report import Curve, CurveChart

COLOURS = ("bn", "third", "fourth", "fifth")
PLAIN_SHADES = ("#e0701f", "#f3b98d", "#6b3006", "#a84d0c")
SMALLEST = 1e-12
"""Below this a curve of gradients ends: vanished ones would flatten all others."""


def shown_name(network: Mapping[str, Any], rates: bool = True) -> str:
    """A network's name for people, with its learning rate where there are several."""
    kind = network["kind"]
    name = "LSTM" if kind == "plain" else f"BN-LSTM, γ from {kind.removeprefix('bn-')}"
    return f"{name}, rate {network['rate']:g}" if rates and kind == "plain" else name


def _colours(networks: list[Mapping[str, Any]]) -> list[str]:
    normalized = [one["kind"] for one in networks if one["kind"] != "plain"]
    plain = [one["rate"] for one in networks if one["kind"] == "plain"]
    return [
        PLAIN_SHADES[plain.index(one["rate"]) % len(PLAIN_SHADES)]
        if one["kind"] == "plain"
        else COLOURS[normalized.index(one["kind"]) % len(COLOURS)]
        for one in networks
    ]


def accuracy_chart(summary: Mapping[str, Any], task: str) -> CurveChart:
    """Test accuracy over steps, median and range of the seeds."""
    networks = summary["tasks"][task]["networks"]
    curves = [
        Curve(shown_name(one), one["steps"], one["accuracy"], colour, one["kind"] == "plain")
        for one, colour in zip(networks, _colours(networks), strict=True)
    ]
    settings = summary["experiment"]
    title = f"{settings['data']}, {task}: test accuracy, median and range of {settings['seeds']} seeds"
    return CurveChart(title, f"training steps (batches of {settings['batch_size']})", "test accuracy", curves)


def gradient_chart(summary: Mapping[str, Any], task: str, point: int) -> CurveChart:
    """Gradients through time, before training (point 0) or after (1), over those in the last state.

    Of the plain LSTM at the common rate alone.
    """
    networks = summary["tasks"][task]["networks"]
    rate = summary["experiment"]["rate"]
    curves = []
    for one, colour in zip(networks, _colours(networks), strict=True):
        if one["rate"] != rate or len(one["gradients"]) <= point:
            continue
        norms = np.array(one["gradients"][point]["norms"], dtype=float)
        shares = norms / norms[-1]
        shares = np.where(shares > SMALLEST, shares, np.nan)
        steps = np.arange(1, len(shares) + 1)
        curves.append(Curve(shown_name(one, rates=False), steps, shares, colour, one["kind"] == "plain"))
    title = f"{task}: ‖∂loss/∂h_t‖ over that in the last state, {('before', 'after')[point]} training"
    return CurveChart(title, "time step t", "gradient, relative", curves, log_y=True)
