"""``batchnorm reproduce ensemble``."""

import sys

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.reproduce.ensemble import Ensemble, run_experiment
from batchnorm.reproduce.ensemble.page import steps_down


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its table and where the page is."""
    experiment = tyro.cli(Ensemble, prog="batchnorm reproduce ensemble", args=argv)
    summary = run_experiment(experiment)
    paper = ("25.2 %", "21.99 % (144 crops)", "20.1 % (144 crops)")
    table = Table(
        "networks and crops", "top-1 error", "loss", "paper", title=f"{experiment.data}: crops and ensemble"
    )
    for (name, error, loss), theirs in zip(steps_down(summary), paper, strict=True):
        table.add_row(name, f"{error:.2%}", f"{loss:.4f}", theirs)
    Console().print(table)
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")
