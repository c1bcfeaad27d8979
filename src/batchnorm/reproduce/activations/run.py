"""The whole of it: jobs, summary, pictures and page; goes on where an earlier call stopped."""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.data import load, num_cores
from batchnorm.files import write_json
from batchnorm.reading import read_json
from batchnorm.reproduce.activations.experiment import Activations
from batchnorm.reproduce.activations.job import History, path_of, run_job
from batchnorm.reproduce.activations.page import write_report
from batchnorm.reproduce.activations.summary import Histories, summarize
from batchnorm.reproduce.claiming import claim_folder, science
from batchnorm.reproduce.pool import run_jobs
from batchnorm.train.run import environment


def run_experiment(experiment: Activations) -> dict[str, Any]:
    """Run what is not yet done and return the summary, which also stands in ``result.json``.

    Raises:
        ValueError: The folder holds an experiment with other settings.
        FileNotFoundError, ConnectionError: The data are not to be had.
        OSError: The folder cannot be written; jobs that were done stay done.
    """
    (experiment.out / "jobs").mkdir(parents=True, exist_ok=True)
    claim_folder(experiment.out, science(experiment))
    # Once here, so that a download or its error comes before any process is started.
    load(experiment.data, experiment.data_dir)
    wanted = [(seed, normalize) for seed in range(experiment.seeds) for normalize in (False, True)]
    missing = [(experiment, *job) for job in wanted if not _is_whole(path_of(experiment, *job))]
    if done := len(wanted) - len(missing):
        print(f"{done} of {len(wanted)} jobs are already done in {experiment.out}", file=sys.stderr)
    start = time.perf_counter()
    num_steps = experiment.steps * len(experiment.rates) * len(missing)
    run_jobs(run_job, missing, num_steps=num_steps, num_processes=experiment.processes, title="activations")
    plain, bn = (
        [History.read(path_of(experiment, seed, normalize)) for seed in range(experiment.seeds)]
        for normalize in (False, True)
    )
    summary = summarize(experiment, Histories(plain, bn))
    # Of an uninterrupted run, or unknown.
    whole = len(missing) == len(wanted)
    summary["wall_s"] = round(time.perf_counter() - start, 1) if whole else _earlier_wall_s(experiment.out)
    write_json(experiment.out / "result.json", summary)
    write_report(summary, experiment.out, _footer(experiment, summary))
    return summary


def _footer(experiment: Activations, summary: Mapping[str, Any]) -> dict[str, object]:
    found = environment(torch.device("cpu"))
    training, evaluation = np.sum([*summary["seconds"]["plain"], *summary["seconds"]["bn"]], axis=0)
    shown = {name: found[name] for name in ("batchnorm", "torch", "python", "cpu")}
    processes = min(experiment.processes or num_cores(), 2 * experiment.seeds)
    return {
        **shown,
        "processes": f"{processes}, one thread each",
        "time in training steps": f"{training:,.0f} core-seconds",
        "time in evaluations": f"{evaluation:,.0f} core-seconds",
        "settings": json.dumps(science(experiment)),
    }


def _earlier_wall_s(out: Path) -> float | None:
    try:
        return read_json(out / "result.json")["wall_s"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_whole(path: Path) -> bool:
    try:
        History.read(path)
    except (OSError, ValueError, TypeError):
        return False
    return True
