"""From parts to the figures that are claimed: pure functions, plain data out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from batchnorm.paired import Paired
from batchnorm.reproduce.claiming import science
from batchnorm.reproduce.parts import plain
from batchnorm.reproduce.regularization.experiment import KINDS, Regularization
from batchnorm.reproduce.regularization.job import name_of

SCORES = ("loss", "train", "held_out", "test", "moving")

Cell = tuple[str, float, int]
"""Kind, dropout and batch size."""


def summarize(experiment: Regularization, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Every figure of the report, as JSON would hold it; a list of scores has one entry a seed."""
    cells = {
        cell: _cell(cell, [parts[name_of(*cell, seed)]["runs"] for seed in range(experiment.seeds)])
        for batch_size in experiment.batch_sizes
        for kind in KINDS
        for dropout in experiment.dropouts
        for cell in [(kind, dropout, batch_size)]
    }
    dropped = [dropout for dropout in experiment.dropouts if dropout]
    return plain(
        {
            "experiment": science(experiment),
            "cells": list(cells.values()),
            "dropout": [
                {
                    "batch_size": batch_size,
                    "dropout": dropout,
                    **{kind: _gain(cells, (kind, dropout), (kind, 0.0), batch_size) for kind in KINDS},
                    "interaction": _interaction(cells, dropout, batch_size),
                }
                for batch_size in experiment.batch_sizes
                for dropout in dropped
            ],
            "bn": [
                {
                    "batch_size": batch_size,
                    "dropout": dropout,
                    **{
                        name: _gain(cells, ("bn", dropout), ("plain", dropout), batch_size, name)
                        for name in ("test", "gap")
                    },
                }
                for batch_size in experiment.batch_sizes
                for dropout in experiment.dropouts
            ],
        }
    )


def _cell(cell: Cell, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """A cell at each rate, and at the one whose mean held-out accuracy is best where no seed diverged."""
    rates = []
    for runs in zip(*seeds, strict=True):
        diverged = sum(run["diverged"] is not None for run in runs)
        held_out = None if diverged else _mean([run["held_out"] for run in runs])
        rates.append({"rate": runs[0]["rate"], "diverged": diverged, "held_out": held_out})
    kind, dropout, batch_size = cell
    found: dict[str, Any] = {"kind": kind, "dropout": dropout, "batch_size": batch_size, "rates": rates}
    standing = [index for index, rate in enumerate(rates) if rate["held_out"] is not None]
    if not standing:
        return {**found, "rate": None, **dict.fromkeys((*SCORES, "gap"))}
    best = max(standing, key=lambda index: rates[index]["held_out"])
    scores = {name: [runs[best][name] for runs in seeds] for name in SCORES}
    gap = [train - test for train, test in zip(scores["train"], scores["test"], strict=True)]
    return {**found, "rate": rates[best]["rate"], **scores, "gap": gap}


def _gain(
    cells: Mapping[Cell, Mapping[str, Any]],
    first: tuple[str, float],
    second: tuple[str, float],
    batch_size: int,
    score: str = "test",
) -> dict[str, Any] | None:
    """How much more the first cell has than the second, seed by seed; None where all rates diverged."""
    values = [cells[(*cell, batch_size)][score] for cell in (first, second)]
    return None if None in values else _told(Paired.of(*values))


def _interaction(
    cells: Mapping[Cell, Mapping[str, Any]], dropout: float, batch_size: int
) -> dict[str, Any] | None:
    """What dropout adds with BN, less what it adds without."""
    gains = [_gain(cells, (kind, dropout), (kind, 0.0), batch_size) for kind in ("bn", "plain")]
    if gains[0] is None or gains[1] is None:
        return None
    return _told(Paired.of(gains[0]["values"], gains[1]["values"]))


def _told(paired: Paired) -> dict[str, Any]:
    return {
        "values": list(paired.values),
        "mean": paired.mean,
        "std": paired.std,
        "half_width": paired.half_width,
        "told_apart": paired.is_told_apart,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
