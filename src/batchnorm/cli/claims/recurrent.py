"""``batchnorm reproduce recurrent``."""

import sys

import tyro
from rich.console import Console

from batchnorm.cli.tables import shown
from batchnorm.reproduce.recurrent import Recurrent, run_experiment
from batchnorm.reproduce.recurrent.page import accuracy_table, gradient_table

LEFT_OUT = ("loss", "middle", "best on the way, %", "ms a step")
"""Columns for which a terminal has no room; they are on the page."""


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Recurrent, prog="batchnorm reproduce recurrent", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for task in experiment.tasks:
        for found in (accuracy_table(summary, task), gradient_table(summary, task)):
            console.print(shown(found, f"{experiment.data}: {found.title}", left_out=LEFT_OUT))
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")
