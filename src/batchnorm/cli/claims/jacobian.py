"""``batchnorm reproduce jacobian``."""

import sys

import tyro
from rich.console import Console

from batchnorm.cli.tables import shown
from batchnorm.reproduce.jacobian import Jacobian, run_experiment
from batchnorm.reproduce.jacobian.page import gradient_table, spectrum_table

LEFT_OUT = ("loss", "zero", "condition", "first / last, in W")
"""Columns for which a terminal has no room; they are on the page."""


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Jacobian, prog="batchnorm reproduce jacobian", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for activation in experiment.activations:
        for found in (spectrum_table(summary, "paper", activation), gradient_table(summary, activation)):
            console.print(shown(found, f"{experiment.data}: {found.title}", left_out=LEFT_OUT))
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")
