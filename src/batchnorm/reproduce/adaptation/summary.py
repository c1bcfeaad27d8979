"""From parts to the figures that are claimed: pure functions, plain data out."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from batchnorm.reproduce.adaptation.experiment import Adaptation
from batchnorm.reproduce.claiming import science
from batchnorm.reproduce.parts import plain


def summarize(experiment: Adaptation, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the report, as JSON would hold it: a list over seeds for each.

    Returns:
        ``experiment``; ``own``, by source the accuracy on its own test images; ``targets``, by source and
        target ``before``, ``there`` (of the network trained there, or None), ``entropy`` before, ``refused``,
        and for each of ``runs`` what `job.adapted` says.
    """
    seeds = range(experiment.seeds)

    def of(domain: str) -> list[Any]:
        return [parts[f"{domain.replace(' ', '-')}-seed-{seed}"] for seed in seeds]

    def trained(domain: str) -> list[float] | None:
        has = domain in experiment.sources or domain in experiment.trained(domain.split()[0])
        return [one["accuracy"] for one in of(domain)] if has else None

    own, targets = {}, {}
    for source in experiment.sources:
        found = of(source)
        own[source] = [one["accuracy"] for one in found]
        targets[source] = {
            target: _merged([one["targets"][target] for one in found]) | {"there": trained(target)}
            for target in experiment.targets(source)
        }
    return plain({"experiment": science(experiment), "own": own, "targets": targets})


def _merged(found: list[Any]) -> Any:
    if isinstance(found[0], Mapping):
        return {name: _merged([one[name] for one in found]) for name in found[0]}
    return found


def rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Source, target, and what was found there."""
    for source, targets in summary["targets"].items():
        for target, found in targets.items():
            yield source, target, found


def mean(values: list[float]) -> float:
    """Over seeds."""
    return float(np.mean(values))


def deviation(values: list[float]) -> float:
    """Standard deviation over seeds, unbiased; 0 of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def over_targets(summary: Mapping[str, Any], source: str, run: str) -> list[float]:
    """For each seed, the mean accuracy over those of a source's targets in which a network was trained.

    Args:
        summary: As `summarize` gives it.
        source: What the networks were trained on.
        run: "before", "there", or of ``runs``.
    """
    found = [of for of in summary["targets"][source].values() if of["there"] is not None]
    values = [one[run] if run in ("before", "there") else one["runs"][run]["accuracy"] for one in found]
    return np.mean(values, axis=0).tolist()


def gains(summary: Mapping[str, Any], run: str, against: str = "before") -> dict[str, float]:
    """By "SOURCE → TARGET", how much the mean accuracy of a run is above another's."""
    found = {}
    for source, target, of in rows(summary):
        other = of["before"] if against == "before" else of["runs"][against]["accuracy"]
        found[f"{source} → {target}"] = mean(of["runs"][run]["accuracy"]) - mean(other)
    return found
