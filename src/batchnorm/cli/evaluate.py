"""`batchnorm evaluate`: scores of saved runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.train import evaluate_runs

DESCRIPTION = """\
Top-1 and top-5 accuracy of runs on their test set; several runs are also scored as an ensemble,
by the mean of their class probabilities.

Examples:
  batchnorm evaluate runs/bn
  batchnorm evaluate runs/seed-0 runs/seed-1 runs/seed-2
  batchnorm evaluate runs/bn --checkpoint best
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
    data_dir: Path | None = None
    """Folder with the data's files, as for batchnorm train."""


def run(argv: list[str]) -> None:
    """Parse `argv`, evaluate, and print a table."""
    arguments = tyro.cli(EvaluateArguments, prog="batchnorm evaluate", description=DESCRIPTION, args=argv)
    table = Table("run", "top-1", "top-5", "loss", "images")
    for result in evaluate_runs(arguments.runs, data_dir=arguments.data_dir, checkpoint=arguments.checkpoint):
        scores = result.scores
        table.add_row(
            result.name,
            f"{scores.top1:.2%}",
            f"{scores.top5:.2%}",
            f"{scores.loss:.4f}",
            str(scores.num_examples),
        )
    Console().print(table)
