"""`batchnorm evaluate`: scores of saved runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.train import evaluate_runs
from batchnorm.train.inputs import Crops

DESCRIPTION = """\
Top-1 and top-5 accuracy of runs on their test set; several runs are also scored as an ensemble,
by the mean of their class probabilities.

Examples:
  batchnorm evaluate runs/bn
  batchnorm evaluate runs/seed-0 runs/seed-1 runs/seed-2
  batchnorm evaluate runs/bn --checkpoint best
  batchnorm evaluate runs/x30-* --crops 144 --per-class

Predictions are kept in the runs' folders, so that an ensemble of evaluated runs costs no second pass.
"""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """What `batchnorm evaluate` is told."""

    runs: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(at least one)"),
    ]
    """Folders that batchnorm train wrote."""
    checkpoint: str | None = None
    """newest, best or a step: that checkpoint, with fresh population statistics; else the final model."""
    crops: Crops = 1
    """Views of each image whose predictions are averaged: 1, 10, or the paper's 144."""
    per_class: bool = False
    """Tell the accuracy of each class, too."""
    data_dir: Path | None = None
    """Folder with the data's files, as for batchnorm train; for images on disk where they are now."""
    workers: int | None = None
    """Processes that decode images on disk (default: one for each core but one)."""


def run(argv: list[str]) -> None:
    """Parse `argv`, evaluate, and print a table."""
    arguments = tyro.cli(EvaluateArguments, prog="batchnorm evaluate", description=DESCRIPTION, args=argv)
    table = Table("run", "top-1", "top-5", "loss", "images")
    results = evaluate_runs(
        arguments.runs,
        data_dir=arguments.data_dir,
        checkpoint=arguments.checkpoint,
        crops=arguments.crops,
        per_class=arguments.per_class,
        num_workers=arguments.workers,
    )
    for result in results:
        scores = result.scores
        table.add_row(
            result.name,
            f"{scores.top1:.2%}",
            f"{scores.top5:.2%}",
            f"{scores.loss:.4f}",
            str(scores.num_examples),
        )
    console = Console()
    console.print(table)
    if arguments.per_class:
        of_each = Table("class", *(result.name for result in results), title="top-1 of each class")
        for name in results[0].per_class:
            of_each.add_row(name, *(f"{result.per_class[name]:.2%}" for result in results))
        console.print(of_each)
