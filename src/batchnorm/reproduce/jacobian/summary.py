"""From parts to the figures that are claimed: pure functions, plain data out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from batchnorm.reproduce.claiming import science
from batchnorm.reproduce.jacobian.experiment import KINDS, NETWORKS, Jacobian
from batchnorm.reproduce.jacobian.layers import growth_at_start
from batchnorm.reproduce.parts import plain

SPECTRUM = ("percentiles", "rms", "share", "zero", "condition")


def summarize(experiment: Jacobian, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the report, as JSON would hold it: medians over seeds, layer by layer."""
    networks = {}
    for which in NETWORKS:
        for activation in experiment.activations:
            for kind in KINDS:
                seeds = [
                    parts[f"{which}-{activation}-{kind}-seed-{seed}"]["runs"]
                    for seed in range(experiment.seeds)
                ]
                networks[f"{which}/{activation}/{kind}"] = [
                    _network(std, [runs[index]["points"] for runs in seeds])
                    for index, std in enumerate(experiment.init_stds)
                ]
    return plain(
        {
            "experiment": science(experiment),
            "growth_at_start": {name: growth_at_start(name) for name in experiment.activations},
            "gaussian": gaussian_matrix(),
            "networks": networks,
        }
    )


def gaussian_matrix() -> dict[str, float]:
    """Singular values of a large square matrix of independent Gaussians whose root mean square is 1.

    Their density is sqrt(4 − s²)/π up to 2 (the quarter circle). Share in [0.5, 2] and percentiles.
    """
    s = np.linspace(0, 2, 200_001)
    below = np.cumsum(np.sqrt(4 - s**2))
    below /= below[-1]
    low, middle, high = (float(np.interp(level, below, s)) for level in (0.05, 0.5, 0.95))
    return {"share": float(1 - np.interp(0.5, s, below)), "5th": low, "median": middle, "95th": high}


def factor(gradient: Sequence[float | None]) -> float | None:
    """By how much the gradient grows, a layer back: (first / last)^(1/(layers − 1))."""
    ratio = first_over_last(gradient)
    return None if ratio is None else ratio ** (1 / (len(gradient) - 1))


def first_over_last(gradient: Sequence[float | None]) -> float | None:
    """Gradient at the first layer over that at the last; None where one is not finite or the last is zero."""
    first, last = gradient[0], gradient[-1]
    return None if first is None or not last or not math.isfinite(first / last) else first / last


def _network(std: float, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """One network from one initial deviation, at those points that every seed has reached."""
    points = []
    for found in zip(*seeds, strict=False):
        point: dict[str, Any] = {
            "step": found[0]["step"],
            "loss": [one["loss"] for one in found],
            "ratio": [first_over_last(one["gradient"]) for one in found],
            "weight_ratio": [first_over_last(one["weight_gradient"]) for one in found],
            "factor": [factor(one["gradient"]) for one in found],
            "gradient": _middle([one["gradient"] for one in found]),
            "singular": {
                name: _middle([one["singular"][name] for one in found], infinite=name == "condition")
                for name in SPECTRUM
            },
        }
        for name in ("conditions", "whole"):
            if name in found[0]:
                point[name] = _merged([one[name] for one in found])
        points.append(point)
    return {"init_std": std, "points": points}


def _middle(values: Sequence[Any], *, infinite: bool = False) -> Any:
    """The median over the first dimension; what is None counts as infinite, or as no value at all."""
    array = np.array(values, dtype=np.float64)
    array = np.where(np.isnan(array), np.inf, array) if infinite else array
    # The middle one that is there, so that infinities need no arithmetic.
    ordered = np.sort(array, axis=0)
    return ordered[(len(ordered) - 1) // 2].tolist()


def _merged(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return {name: _merged([one[name] for one in values]) for name in values[0]}
    if isinstance(values[0], list) and isinstance(values[0][0], Mapping):
        return [_merged(list(each)) for each in zip(*values, strict=True)]
    return _middle(values)
