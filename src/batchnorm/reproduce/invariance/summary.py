"""From parts to the figures that are claimed: pure functions, plain data out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from batchnorm.reproduce.claiming import science
from batchnorm.reproduce.invariance.experiment import DTYPES, EQUATIONS, LAYERS, STATES, Invariance
from batchnorm.reproduce.parts import plain

KINDS = ("bn", "plain")


def summarize(experiment: Invariance, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the report, as JSON would hold it."""
    layers = {
        f"{kind}/{state}": [parts[f"equations-{kind}-seed-{seed}"][state] for seed in range(experiment.seeds)]
        for kind in LAYERS
        for state in STATES
    }
    training = {
        kind: [parts[f"training-{kind}-seed-{seed}"]["runs"] for seed in range(experiment.seeds)]
        for kind in KINDS
    }
    return plain(
        {
            "experiment": science(experiment),
            "scales": experiment.scales,
            "layers": {name: _layer(found) for name, found in layers.items()},
            "exact": _exact([one for found in layers.values() for one in found]),
            "agreement": max(one["agreement"] for found in layers.values() for one in found),
            "training": {kind: _training(experiment, runs) for kind, runs in training.items()},
        }
    )


def _layer(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One layer in one state: for each way to compute, the largest deviation of the seeds at each scale."""
    return {
        "deviation": [float(np.median([seed["deviation"][q] for seed in seeds])) for q in range(3)],
        "deviations": {
            way: {
                equation: np.max([seed["deviations"][way][equation] for seed in seeds], 0).tolist()
                for equation in EQUATIONS
            }
            for way in seeds[0]["deviations"]
        },
        "predicted": {
            equation: np.max([seed["predicted"][equation] for seed in seeds], 0).tolist()
            for equation in EQUATIONS
        },
        "refused": seeds[0]["refused"],
    }


def _exact(all_found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """With eps = 0: for each dtype and kernel the largest deviation of all layers, seeds and scales."""
    result: dict[str, Any] = {}
    for dtype in DTYPES:
        for way in all_found[0]["powers_of_two"]:
            if way.startswith(f"{dtype}/"):
                result[way] = {
                    equation: max(max(found["deviations"][f"{way}/0"][equation]) for found in all_found)
                    for equation in EQUATIONS
                }
                result[way]["powers_of_two"] = sum(found["powers_of_two"][way] for found in all_found)
                result[way]["powers_tried"] = 8 * len(all_found)
    return result


def _training(experiment: Invariance, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One row for each rate and initial deviation, in the order of the parts."""
    rows = []
    for index, first in enumerate(seeds[0]):
        runs = [runs[index] for runs in seeds]
        ratios = [
            grown / taken
            for run in runs
            for grown, taken in zip(run["growth"], run["steps_taken"], strict=True)
            if taken > 0
        ]
        weight = np.array([run["weight"] for run in runs])
        gradient = np.array([run["gradient"] for run in runs])
        rate = first["rate"]
        rows.append(
            {
                "rate": rate,
                "init_std": first["init_std"],
                "step": first["step"],
                "weight": weight.tolist(),
                "gradient": gradient.tolist(),
                "effective": (rate / weight**2).tolist(),
                "product": [float(np.median((weight * gradient)[:, t])) for t in (0, -1)],
                "cosine": max(max(map(abs, run["cosine"])) for run in runs),
                "growth_over_steps": [min(ratios), max(ratios)],
                "loss": [run["loss"] for run in runs],
                "final_loss": [run["final_loss"] for run in runs],
                "final_accuracy": [run["final_accuracy"] for run in runs],
            }
        )
    return rows


def spread_of_rates(rows: Sequence[Mapping[str, Any]], rate: float) -> tuple[float, float]:
    """Largest over smallest effective rate among initial deviations, at the first step and at the last."""
    these = [np.median(row["effective"], axis=0) for row in rows if row["rate"] == rate]
    first, last = ([of[t] for of in these] for t in (0, -1))
    return max(first) / min(first), max(last) / min(last)


def spread_of_losses(rows: Sequence[Mapping[str, Any]], rate: float) -> float:
    """Largest over smallest loss at the end, medians of seeds, among initial deviations."""
    these = [float(np.median(row["final_loss"])) for row in rows if row["rate"] == rate]
    return max(these) / min(these)
