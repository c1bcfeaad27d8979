"""The whole of it: members, predictions, summary, picture and page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.data import num_cores
from batchnorm.files import write_json
from batchnorm.reproduce.claiming import claim_folder, science
from batchnorm.reproduce.ensemble.experiment import Ensemble
from batchnorm.reproduce.ensemble.page import write_report
from batchnorm.reproduce.pool import advance, run_jobs
from batchnorm.reproduce.training import folder_of, train_all
from batchnorm.train.evaluate import Scores, score
from batchnorm.train.inputs import Crops
from batchnorm.train.predictions import mean_log_probabilities, run_predictions
from batchnorm.train.run import environment


def run_experiment(experiment: Ensemble) -> dict[str, Any]:
    """Do what is not yet done and return the summary, which also stands in ``result.json``.

    Raises:
        ValueError: The folder holds an experiment with other settings.
        FileNotFoundError, ConnectionError: The data are not to be had.
        FloatingPointError: A member diverged.
        OSError: The folder cannot be written; trainings that were done stay done.
    """
    out, members = experiment.out, experiment.members()
    out.mkdir(parents=True, exist_ok=True)
    claim_folder(out, science(experiment))
    title = f"{len(members)} members"
    train_all(out, members, experiment.data, experiment.data_dir, processes=experiment.processes, title=title)
    views: tuple[Crops, ...] = (1, experiment.crops)
    jobs = [(folder_of(out, name), experiment.data_dir, crops) for name in members for crops in views]
    run_jobs(
        keep_predictions, jobs, num_steps=len(jobs), num_processes=experiment.processes, title="evaluating"
    )
    summary = summarize(experiment)
    write_json(out / "result.json", summary)
    here = environment(torch.device("cpu"))
    footer = {
        **{name: here[name] for name in ("batchnorm", "torch", "python", "cpu")},
        "processes": f"{experiment.processes or num_cores()}, one thread each",
        "settings": json.dumps(science(experiment)),
    }
    write_report(summary, out, footer)
    return summary


def keep_predictions(run: Path, data_dir: Path | None, crops: Crops) -> None:
    """Evaluate one run, which leaves its predictions in its folder."""
    run_predictions(run, data_dir=data_dir, crops=crops)
    advance(1)


def summarize(experiment: Ensemble) -> dict[str, Any]:
    """Errors of single networks and of all together, by one crop and by many, as JSON would hold them."""
    result: dict[str, Any] = {
        "experiment": science(experiment),
        "changes": {name: _changes(experiment, name) for name in experiment.members()},
        "errors": {},
    }
    for kind, crops in (("single", 1), ("multi", experiment.crops)):
        found = [
            run_predictions(folder_of(experiment.out, name), data_dir=experiment.data_dir, crops=crops)[0]
            for name in experiment.members()
        ]
        each = [_errors(score(of.log_probabilities, of.labels)) for of in found]
        together = mean_log_probabilities(torch.stack([of.log_probabilities for of in found]))
        result["errors"][kind] = {
            "members": dict(zip(experiment.members(), each, strict=True)),
            "mean": {name: float(np.mean([errors[name] for errors in each])) for name in each[0]},
            "ensemble": _errors(score(together, found[0].labels)),
        }
    return result


def _errors(scores: Scores) -> dict[str, float]:
    return {"top1": 1 - scores.top1, "top5": 1 - scores.top5, "loss": scores.loss}


def _changes(experiment: Ensemble, name: str) -> str:
    recipe = experiment.members()[name]
    parts = [
        f"initial weights × {recipe.init_scale:g}" if recipe.init_scale != 1 else "",
        f"dropout {recipe.dropout:.0%}" if recipe.dropout else "",
        "per-activation BN in the last module" if recipe.per_activation else "",
    ]
    return ", ".join(filter(None, parts))
