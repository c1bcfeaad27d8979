"""``batchnorm reproduce regularization``."""

import sys

import tyro
from rich.console import Console

from batchnorm.cli.tables import shown
from batchnorm.reproduce.regularization import Regularization, run_experiment
from batchnorm.reproduce.regularization.page import cell_table, gain_table

LEFT_OUT = ("training, %", "test, moving averages, %", "training loss")
"""Columns for which a terminal has no room; they are on the page."""


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Regularization, prog="batchnorm reproduce regularization", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for found in (cell_table(summary), gain_table(summary)):
        console.print(shown(found, f"{experiment.data}: {found.title}", left_out=LEFT_OUT))
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")
