"""From histories to the figures that are claimed: pure functions of arrays, plain data out."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.reproduce.activations.experiment import Activations
from batchnorm.reproduce.activations.job import History
from batchnorm.reproduce.claiming import science

KINDS = ("plain", "bn")
MILESTONES = (0.8, 0.9, 0.95, 0.96, 0.97)
COMPARED_FROM_STEP = 500


@dataclass(frozen=True)
class Histories:
    """All jobs, by kind; the s-th entry of each list is seed s."""

    plain: list[History]
    bn: list[History]

    @property
    def steps(self) -> np.ndarray:
        """(E,), the evaluation points, which all jobs share."""
        return self.plain[0].steps

    def accuracy(self, kind: str, rate_index: int) -> np.ndarray:
        """(S, E), one row a seed."""
        return np.stack([history.accuracy[rate_index] for history in getattr(self, kind)])


def first_step_reaching(steps: np.ndarray, accuracy: np.ndarray, target: float) -> int | None:
    """The first evaluation point at which ``accuracy`` (E,) is at least ``target``, or ``None``."""
    reached = np.flatnonzero(accuracy >= target)
    return int(steps[reached[0]]) if reached.size else None


def speed_up(steps: np.ndarray, plain: np.ndarray, bn: np.ndarray) -> dict[str, Any]:
    """How many fewer steps BN needs for the plain network's best accuracy, seed by seed.

    Args:
        steps: (E,).
        plain: (S, E) accuracies without BN.
        bn: (S, E) accuracies with BN.

    Returns:
        For each seed the best accuracy of the plain network, the first step at which it had it, the
        first at which the BN network has it (``None``: never), and the ratio; and the median ratio
        over all seeds, a seed that never gets there counting as 0.
    """
    seeds = []
    for without, with_bn in zip(plain, bn, strict=True):
        best = float(without.max())
        plain_steps = first_step_reaching(steps, without, best)
        bn_steps = first_step_reaching(steps, with_bn, best)
        # A plain network that is best before any training has learned nothing to be compared with.
        ratio = plain_steps / bn_steps if plain_steps and bn_steps else None
        seeds.append({"best": best, "plain_steps": plain_steps, "bn_steps": bn_steps, "ratio": ratio})
    ratios = [seed["ratio"] or 0.0 for seed in seeds]
    return {"median_ratio": float(np.median(ratios)), "reached": sum(r > 0 for r in ratios), "seeds": seeds}


def milestones(steps: np.ndarray, accuracy: np.ndarray) -> list[int | None]:
    """The step by which half of the seeds have each of `MILESTONES`; ``None``: they never have.

    Args:
        steps: (E,).
        accuracy: (S, E), one row a seed.
    """
    found = []
    for target in MILESTONES:
        firsts = [first_step_reaching(steps, seed, target) for seed in accuracy]
        ordered = sorted(np.inf if first is None else first for first in firsts)
        middle = ordered[(len(ordered) - 1) // 2]
        found.append(None if np.isinf(middle) else int(middle))
    return found


def drift(steps: np.ndarray, percentiles: np.ndarray) -> np.ndarray:
    """How far each unit's input distribution moves from one evaluation to the next.

    Args:
        steps: (E,).
        percentiles: (E, ..., 3), the {15, 50, 85}th.

    Returns:
        (E − 1, ...): |change of the median|, in units of half the distance between the 15th and
        the 85th percentile at the earlier point (one deviation, if it were Gaussian), per 1,000 steps.
    """
    low, median, high = np.moveaxis(percentiles.astype(np.float64), -1, 0)
    width = np.maximum((high - low)[:-1] / 2, np.finfo(np.float32).tiny)
    per_interval = np.abs(np.diff(median, axis=0)) / width
    intervals = np.diff(steps).reshape(-1, *[1] * (per_interval.ndim - 1))
    return per_interval * 1000 / intervals


def path_length(percentiles: np.ndarray) -> np.ndarray:
    """All the way that each unit's median goes, in the widths of `drift`; (E, ..., 3) to (...)."""
    return drift(np.arange(len(percentiles)) * 1000, percentiles).sum(0)


def typical_unit(percentiles: np.ndarray) -> int:
    """The unit whose path length is the median one of its layer; (E, U, 3)."""
    order = np.argsort(path_length(percentiles))
    return int(order[len(order) // 2])


def summarize(experiment: Activations, histories: Histories) -> dict[str, Any]:
    """Every figure of the report, as JSON would hold it."""
    steps = histories.steps
    headline = experiment.rates.index(experiment.headline_rate)
    rates = []
    for index, rate in enumerate(experiment.rates):
        plain, bn = histories.accuracy("plain", index), histories.accuracy("bn", index)
        gap = bn[:, -1] - plain[:, -1]
        compared = steps >= min(COMPARED_FROM_STEP, steps[-1])
        rates.append(
            {
                "rate": rate,
                "accuracy": {"plain": plain.tolist(), "bn": bn.tolist()},
                "final": {
                    "plain": _spread(plain[:, -1]),
                    "bn": _spread(bn[:, -1]),
                    "difference": _spread(gap),
                },
                "compared": int(compared.sum()),
                "mean_above": int((bn.mean(0) > plain.mean(0))[compared].sum()),
                "pairs_above": int((bn > plain)[:, compared].sum()),
                "speed_up": speed_up(steps, plain, bn),
                "milestones": {"plain": milestones(steps, plain), "bn": milestones(steps, bn)},
            }
        )
    return {
        "experiment": science(experiment),
        "steps": steps.tolist(),
        "milestones": list(MILESTONES),
        "rates": rates,
        "distributions": {kind: _distributions(histories, kind, headline) for kind in KINDS},
        "seconds": {
            kind: [[float(s) for s in history.seconds] for history in getattr(histories, kind)]
            for kind in KINDS
        },
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {
        "mean": float(values.mean()),
        "std": deviation,
        "min": float(values.min()),
        "max": float(values.max()),
    }


def percent(spread: dict[str, float], *, signed: bool = False) -> str:
    """Mean ± deviation in percent, or in percentage points where ``signed``."""
    sign = "+" if signed else ""
    return f"{100 * spread['mean']:{sign}.2f} ± {100 * spread['std']:.2f} {'points' if signed else '%'}"


def _distributions(histories: Histories, kind: str, rate_index: int) -> dict[str, Any]:
    """Percentiles of a typical unit of the last hidden layer (seed 0); drift of all units, by layer."""
    every = np.stack(
        [history.percentiles[rate_index] for history in getattr(histories, kind)]
    )  # (S, E, L, U, 3)
    last_layer = every[0][:, -1]
    unit = typical_unit(last_layer)
    moves = np.stack([drift(histories.steps, seed) for seed in every])  # (S, E − 1, L, U)
    lengths = np.stack([path_length(seed) for seed in every])  # (S, L, U)
    return {
        "unit": unit,
        "percentiles": last_layer[:, unit].astype(float).round(6).tolist(),
        "drift": moves.mean((0, 3)).T.round(6).tolist(),  # for each layer, over the intervals
        "path_length": [_spread(layer) for layer in lengths.mean(2).T],  # over seeds
    }
