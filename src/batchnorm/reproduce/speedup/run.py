"""The whole of it: trainings in the order in which they tell most, then summary, pictures and page."""

import json
import sys
from typing import Any

import torch

from batchnorm.data import num_cores
from batchnorm.files import write_json
from batchnorm.reproduce.claiming import claim_folder, science
from batchnorm.reproduce.speedup.experiment import Speedup
from batchnorm.reproduce.speedup.page import write_report
from batchnorm.reproduce.speedup.summary import best_rate, summarize
from batchnorm.reproduce.training import Course, courses, train_all
from batchnorm.train import InceptionRecipe
from batchnorm.train.run import environment


def run_experiment(experiment: Speedup) -> dict[str, Any]:
    """Train what is not yet trained and return the summary, which also stands in ``result.json``.

    Raises:
        ValueError: The folder holds an experiment with other settings.
        FileNotFoundError, ConnectionError: The data are not to be had.
        OSError: The folder cannot be written; trainings that were done stay done.
    """
    out = experiment.out
    out.mkdir(parents=True, exist_ok=True)
    claim_folder(out, science(experiment))
    recipes = experiment.networks()
    _train(experiment, recipes, "five networks")
    rate = best_rate(experiment, courses(out, list(recipes)))
    at_best = {
        experiment.at_rate_name(rate, seed): experiment.at_rate(rate, seed)
        for seed in range(experiment.seeds)
    }
    _train(experiment, at_best, "plain Inception at its best rate")
    ablated = experiment.ablated()
    _train(experiment, ablated, "one change undone")
    return report(experiment, recipes | at_best | ablated)


def report(experiment: Speedup, recipes: dict[str, InceptionRecipe]) -> dict[str, Any]:
    """Summary, pictures and page of the trainings that are done."""
    found: dict[str, Course] = courses(experiment.out, list(recipes))
    summary = summarize(experiment, found)
    write_json(experiment.out / "result.json", summary)
    write_report(summary, experiment.out, _footer(experiment, found))
    return summary


def _train(experiment: Speedup, recipes: dict[str, InceptionRecipe], title: str) -> None:
    print(f"speedup: {title}, {len(recipes)} trainings", file=sys.stderr)
    train_all(
        experiment.out,
        recipes,
        experiment.data,
        experiment.data_dir,
        processes=experiment.processes,
        title=title,
    )


def _footer(experiment: Speedup, found: dict[str, Course]) -> dict[str, object]:
    here = environment(torch.device("cpu"))
    steps = sum(int(course.steps[-1]) for course in found.values() if len(course.steps))
    seconds = sum(course.seconds for course in found.values())
    return {
        **{name: here[name] for name in ("batchnorm", "torch", "python", "cpu")},
        "trained on": ", ".join(sorted({course.hardware for course in found.values()})),
        "processes": f"{experiment.processes or num_cores()}, one thread each",
        "trainings": f"{len(found)}, {steps:,} steps, {seconds:,.0f} core-seconds",
        "settings": json.dumps(science(experiment)),
    }
