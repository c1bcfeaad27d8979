"""From parts to the figures that are claimed: pure functions, plain data out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from batchnorm.reproduce.claiming import science
from batchnorm.reproduce.parts import plain
from batchnorm.reproduce.recurrent.experiment import Recurrent
from batchnorm.reproduce.recurrent.job import name_of


def summarize(experiment: Recurrent, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the report, as JSON would hold it.

    Returns:
        ``experiment``; and ``tasks``, by name: ``networks``, what `_network` says of each, in the order of
        `Recurrent.networks`; ``best_rate``, of the plain LSTM; and ``targets``, the lower median of its
        seeds' best accuracies at the common rate (``plain``) and at its best (``plain_at_best``).
    """
    tasks = {}
    for task in experiment.tasks:
        networks = [
            _network(
                kind,
                rate,
                [parts[name_of(task, kind, rate, seed)] for seed in range(experiment.seeds)],
                experiment.steps(task),
            )
            for kind, rate in experiment.networks()
        ]
        best = {one["rate"]: _lower_median(one["best"]) for one in networks if one["kind"] == "plain"}
        best_rate = max(best, key=best.__getitem__)
        targets = {"plain": best[experiment.rate], "plain_at_best": best[best_rate]}
        for one in networks:
            one["steps_to"] = {
                name: [steps_to(one["steps"], course, target) for course in one["accuracy"]]
                for name, target in targets.items()
            }
        tasks[task] = {"networks": networks, "best_rate": best_rate, "targets": targets}
    return plain({"experiment": science(experiment), "tasks": tasks})


def steps_to(steps: Sequence[int], accuracy: Sequence[float | None], target: float) -> int | None:
    """The first evaluation with at least the accuracy ``target``, or None."""
    reached = (step for step, value in zip(steps, accuracy, strict=True) if value and value >= target)
    return next(reached, None)


def middle_of(steps: Sequence[int | None]) -> int | None:
    """The lower median of the seeds' steps; None, never, where most seeds have none."""
    found = _lower_median([float("inf") if step is None else step for step in steps])
    return None if found == float("inf") else int(found)


def _lower_median(values: Sequence[float]) -> float:
    """A value that at least half of the seeds reach."""
    return sorted(values)[(len(values) - 1) // 2]


def _network(kind: str, rate: float, seeds: Sequence[Mapping[str, Any]], last: int) -> dict[str, Any]:
    """One network's figures: lists over seeds, but for ``steps`` and the gradients' ``norms`` (medians)."""
    points = []
    for step, found in zip((0, last), zip(*(one["gradients"] for one in seeds), strict=False), strict=False):
        norms = np.array([one["norms"] for one in found], dtype=float)
        points.append(
            {
                "step": step,
                "loss": [one["loss"] for one in found],
                "norms": np.median(norms, axis=0),
                "ratio": norms[:, 0] / norms[:, -1],
            }
        )
    return {
        "kind": kind,
        "rate": rate,
        "steps": seeds[0]["steps"],
        "accuracy": [one["accuracy"] for one in seeds],
        "loss": [one["loss"] for one in seeds],
        "best": [max(one["accuracy"]) for one in seeds],
        "final": [one["final"] for one in seeds],
        "seconds": [one["seconds"] for one in seeds],
        "gradients": points,
    }
