"""Networks trained by recipes, one a core, as jobs that a stopped experiment takes up again."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from batchnorm.data import load
from batchnorm.files import write_json
from batchnorm.reading import read_json
from batchnorm.reproduce.pool import advance, run_jobs
from batchnorm.train import Recipe, train
from batchnorm.train.metrics import read_metrics
from batchnorm.train.run import METRICS_FILE, environment

FORMAT = 1


@dataclass(frozen=True)
class Course:
    """How one training went."""

    name: str
    """Of the job: its file is ``NAME.json``."""
    recipe: Recipe
    """What was trained."""
    steps: np.ndarray
    """(E,), steps done at each evaluation."""
    accuracy: np.ndarray
    """(E,), top-1 on the test set with population statistics."""
    seconds: float
    """Spent on steps and evaluations, of a process with one thread."""
    diverged: str | None
    """Why it ended early: loss or weights were no longer finite."""
    final: Mapping[str, float] | None
    """Scores of the finished model, top1, top5 and loss; None if it diverged."""
    hardware: str
    """The processor."""

    @classmethod
    def read(cls, path: Path) -> "Course":
        """Read what `run_training` wrote.

        Raises:
            ValueError, KeyError, TypeError: It is not whole.
            OSError: It is not there.
        """
        found = read_json(path)
        if found["format"] != FORMAT:
            raise ValueError(f"{path}: format {found['format']}, this version reads {FORMAT}")
        rows = [row for row in found["metrics"] if "accuracy" in row]
        columns = {name: np.array([row[name] for row in rows]) for name in ("step", "accuracy")}
        return cls(
            found["name"],
            Recipe.from_older_json(found["recipe"]),
            columns["step"],
            columns["accuracy"],
            found["metrics"][-1]["seconds"] if found["metrics"] else 0.0,
            found["diverged"],
            found["final"],
            found["environment"]["cpu"],
        )

    @property
    def best(self) -> float:
        """Highest accuracy at any evaluation; nan without one."""
        return float(self.accuracy.max()) if len(self.accuracy) else float("nan")

    def steps_to(self, target: float) -> int | None:
        """The first evaluation at which the accuracy is at least ``target``, or None."""
        reached = np.flatnonzero(self.accuracy >= target)
        return int(self.steps[reached[0]]) if reached.size else None


def path_of(out: Path, name: str) -> Path:
    """Where a job keeps its course."""
    return out / "jobs" / f"{name}.json"


def folder_of(out: Path, name: str) -> Path:
    """Where a job's run is: checkpoints while it goes on, then the model."""
    return out / "runs" / name


def run_training(out: Path, name: str, recipe: Recipe, source: str, data_dir: Path | None) -> None:
    """Train one network in a run of its own, and write its course. Divergence is a result."""
    folder = folder_of(out, name)
    data = load(source, data_dir, progress=False)
    diverged = final = None
    try:
        result = train(recipe, data, folder, progress=False, tensorboard=False, on_step=lambda _: advance(1))
        scores = result.scores
        final = {"top1": scores.top1, "top5": scores.top5, "loss": scores.loss}
    except FloatingPointError as error:
        diverged = str(error).partition(":")[0]
    course = {
        "format": FORMAT,
        "name": name,
        "recipe": recipe.to_json(),
        "data": source,
        "environment": environment(torch.device("cpu")),
        "final": final,
        "diverged": diverged,
        "metrics": [row for row in read_metrics(folder / METRICS_FILE) if "accuracy" in row],
    }
    write_json(path_of(out, name), course)


def train_all(
    out: Path,
    recipes: Mapping[str, Recipe],
    source: str,
    data_dir: Path | None,
    *,
    processes: int | None = None,
    title: str,
) -> None:
    """Train what is not yet trained, in the given order.

    Args:
        out: The experiment's folder.
        recipes: By the job's name.
        source: As in `batchnorm.data.load`.
        data_dir: Likewise.
        processes: At most this many at once; one a core when None.
        title: Stands before the progress bar.

    Raises:
        ValueError: The folder holds a job of that name by another recipe.
    """
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    (out / "runs").mkdir(exist_ok=True)
    # Once here, so that a download or its error comes before any process is started.
    load(source, data_dir)
    missing = [name for name, recipe in recipes.items() if not _is_done(out, name, recipe)]
    if done := len(recipes) - len(missing):
        print(f"{done} of {len(recipes)} trainings are already done in {out}", file=sys.stderr)
    jobs = [(out, name, recipes[name], source, data_dir) for name in missing]
    num_steps = sum(recipes[name].steps for name in missing)
    run_jobs(run_training, jobs, num_steps=num_steps, num_processes=processes, title=title)


def _is_done(out: Path, name: str, recipe: Recipe) -> bool:
    try:
        earlier = Course.read(path_of(out, name)).recipe
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if differences := recipe.differences(earlier):
        raise ValueError(
            f"{path_of(out, name)} is of another recipe, which differs in {', '.join(differences)}: "
            "give another --out, or delete that file and the run of that name."
        )
    return True


def courses(out: Path, names: Sequence[str]) -> dict[str, Course]:
    """The courses of those jobs that are done."""
    return {name: Course.read(path_of(out, name)) for name in names if path_of(out, name).exists()}
