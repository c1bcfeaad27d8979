"""From courses of training to the figures that are claimed: pure functions, plain data out."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from batchnorm.reproduce.claiming import science
from batchnorm.reproduce.speedup.experiment import KEPT, NETWORKS, PAPER, PLAIN_SIGMOID, Speedup
from batchnorm.reproduce.training import Course

PLAIN, CHANCE = "inception", 0.1


def best_rate(experiment: Speedup, found: Mapping[str, Course]) -> float:
    """The multiple of the paper's rate at which plain Inception (seed 0) has its best accuracy."""
    factors = (1.0, *experiment.rates)
    courses = {factor: found[experiment.at_rate_name(factor, 0)] for factor in factors}
    alive = {factor: course.best for factor, course in courses.items() if course.diverged is None}
    return max(alive, key=lambda factor: alive[factor]) if alive else 1.0


def summarize(experiment: Speedup, found: Mapping[str, Course]) -> dict[str, Any]:
    """Every figure of the report, as JSON would hold it. Trainings that are not there are left out."""
    rate = best_rate(experiment, found)
    names = {name: f"{name}-seed-{{}}" for name in NETWORKS}
    if rate != 1:
        names[f"{PLAIN}-x{rate:g}"] = f"{PLAIN}-x{rate:g}-seed-{{}}"
    by_seed = {
        name: {seed: found[job] for seed in range(experiment.seeds) if (job := pattern.format(seed)) in found}
        for name, pattern in names.items()
    }
    plain = by_seed[PLAIN]
    own = by_seed.get(f"{PLAIN}-x{rate:g}", plain)
    return {
        "experiment": science(experiment),
        "best_rate": rate,
        "networks": {
            name: {
                **_network(courses),
                "paper": PAPER.get(name),
                "against": _speed_up(courses, plain),
                "against_own_rate": _speed_up(courses, own),
            }
            for name, courses in by_seed.items()
            if courses
        },
        "rates": {
            f"{factor:g}": _course(found[job])
            for factor in (1.0, *experiment.rates)
            if (job := experiment.at_rate_name(factor, 0)) in found
        },
        "plain_sigmoid": _course(found[job]) if (job := f"{PLAIN_SIGMOID}-seed-0") in found else None,
        "ablations": _ablations(experiment, found),
        "recipes": {
            name: found[f"{name}-seed-0"].recipe.to_json() for name in by_seed if f"{name}-seed-0" in found
        },
    }


def _course(course: Course) -> dict[str, Any]:
    return {
        "steps": course.steps.tolist(),
        "accuracy": course.accuracy.tolist(),
        "rate": course.recipe.learning_rate,
        "best": None if np.isnan(course.best) else course.best,
        "final": dict(course.final) if course.final else None,
        "diverged": course.diverged,
        "seconds": course.seconds,
    }


def _network(courses: Mapping[int, Course]) -> dict[str, Any]:
    bests = np.array([course.best for course in courses.values()])
    return {"seeds": {str(seed): _course(course) for seed, course in courses.items()}, "best": spread(bests)}


def _speed_up(courses: Mapping[int, Course], rival: Mapping[int, Course]) -> dict[str, Any]:
    """Seed by seed: steps to the rival's best accuracy, and how many times fewer than it took the rival."""
    rows = []
    for seed in sorted(set(courses) & set(rival)):
        target = rival[seed].best
        theirs, ours = rival[seed].steps_to(target), courses[seed].steps_to(target)
        ratio = theirs / ours if theirs and ours else None
        rows.append({"seed": seed, "target": target, "rival_steps": theirs, "steps": ours, "ratio": ratio})
    ratios = [row["ratio"] for row in rows]
    # A network that never gets there is slower than any that does, so that it counts in the median.
    median = float(np.median([ratio or 0.0 for ratio in ratios])) if ratios else 0.0
    return {"seeds": rows, "median_ratio": median or None}


def _ablations(experiment: Speedup, found: Mapping[str, Course]) -> dict[str, Any]:
    result = {}
    for what in KEPT:
        pairs = [
            (found[job], found[f"bn-x5-seed-{seed}"])
            for seed in range(experiment.ablation_seeds)
            if (job := experiment.ablation_name(what, seed)) in found
        ]
        if pairs:
            result[what] = {
                "best": spread(np.array([kept.best for kept, _ in pairs])),
                "difference": spread(np.array([kept.best - all_changes.best for kept, all_changes in pairs])),
                "courses": [_course(kept) for kept, _ in pairs],
            }
    return result


def spread(values: np.ndarray) -> dict[str, Any]:
    """Mean, unbiased deviation (0 for one value), extremes and number."""
    return {
        "mean": float(values.mean()),
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "min": float(values.min()),
        "max": float(values.max()),
        "num": len(values),
    }


def percent(of: Mapping[str, Any], *, signed: bool = False) -> str:
    """Mean ± deviation in percent; without ± for a single value."""
    sign = "+" if signed else ""
    around = f" ± {100 * of['std']:.2f}" if of["num"] > 1 else ""
    return f"{100 * of['mean']:{sign}.2f}{around}{' points' if signed else ' %'}"
