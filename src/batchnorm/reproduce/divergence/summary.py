"""From parts to the figures that are claimed: pure functions, plain data out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from batchnorm.reproduce.claiming import science
from batchnorm.reproduce.divergence.experiment import KINDS, Divergence
from batchnorm.reproduce.parts import plain

CHANCE_LOSS = math.log(10)
"""Cross-entropy of ten classes by one who knows nothing, in nats."""


def summarize(experiment: Divergence, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the report, as JSON would hold it."""
    seeds = range(experiment.seeds)
    networks = {}
    for activation in experiment.activations:
        for kind in KINDS:
            by_seed = [parts[f"{kind}-{activation}-seed-{seed}"]["runs"] for seed in seeds]
            networks[f"{activation}/{kind}"] = [
                {"rate": rate, **_network([runs[index] for runs in by_seed])}
                for index, rate in enumerate(experiment.rates)
            ]
    headline = experiment.rates.index(experiment.headline_rate)
    curves = {
        f"{activation}/{kind}": [
            {
                name: parts[f"{kind}-{activation}-seed-{seed}"]["runs"][headline][name]
                for name in ("step", "loss", "bias", "weight", "deviation")
            }
            for seed in seeds
        ]
        for activation in experiment.activations
        for kind in KINDS
    }
    return plain(
        {
            "experiment": science(experiment),
            "chance_loss": CHANCE_LOSS,
            "bias_alone": _bias_alone([run for seed in seeds for run in parts[f"bias-seed-{seed}"]["runs"]]),
            "bias_curves": [
                run
                for run in parts["bias-seed-0"]["runs"]
                if run["dtype"] == "float32" and run["rate"] == experiment.headline_rate
            ],
            "networks": networks,
            "curves": curves,
        }
    )


def exponent(steps: Sequence[float], values: Sequence[float | None]) -> float | None:
    """The power of the step by which a positive quantity grows over the last decade of steps.

    The slope of a straight line fitted to logarithms; ``None`` where there are not three positive values.
    """
    pairs = [
        (math.log(step), math.log(value))
        for step, value in zip(steps, values, strict=True)
        if step > 0 and step * 10 >= steps[-1] and value is not None and value > 0
    ]
    if len(pairs) < 3:
        return None
    x, y = np.array(pairs).T
    return float(np.polyfit(x, y, 1)[0])


def _bias_alone(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The worst of all rates and seeds, for each dtype, with and without scaling."""
    found = []
    for scales in (False, True):
        for dtype in ("float32", "float64"):
            these = [run for run in runs if run["scales"] == scales and run["dtype"] == dtype]
            found.append(
                {
                    "scales": scales,
                    "dtype": dtype,
                    "runs": len(these),
                    "largest_bias": max(run["bias"][-1] for run in these),
                    "off_line": max(max(run["off_line"]) for run in these),
                    "moved": max(max(run["moved"]) for run in these),
                    "roundings": max(max(run["roundings"]) for run in these),
                    "loss_moved": max(max(map(abs, run["loss"])) for run in these),
                    "exponent": [
                        min(found_of := [exponent(run["step"], run["bias"]) or 0.0 for run in these]),
                        max(found_of),
                    ],
                }
            )
    return found


def _network(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One rate of one kind; a list has one entry a seed."""
    names = ("not_finite", "grown", "growth", "largest_bias", "final_loss", "final_accuracy")
    found: dict[str, Any] = {name: [run[name] for run in runs] for name in names}
    alive = [run["final_loss"] for run in runs if run["final_loss"] is not None]
    found["median_loss"] = float(np.median(alive)) if len(alive) == len(runs) else None
    found["exponent"] = [
        exponent(run["step"], run["bias"]) if run["not_finite"] is None else None for run in runs
    ]
    return found


def blown_up(network: Mapping[str, Any]) -> int:
    """How many seeds became not finite, or ended with a loss above that of knowing nothing."""
    return sum(loss is None or loss > CHANCE_LOSS for loss in network["final_loss"])


def not_finite(networks: Sequence[Mapping[str, Any]]) -> int:
    """How many runs, of all rates, became not finite."""
    return sum(step is not None for network in networks for step in network["not_finite"])
