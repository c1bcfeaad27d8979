"""``batchnorm reproduce invariance``."""

import sys

import tyro
from rich.console import Console

from batchnorm.cli.tables import shown
from batchnorm.reproduce.invariance import Invariance, run_experiment
from batchnorm.reproduce.invariance.page import exact_table, training_table

LEFT_OUT = ("‖W‖ · ‖gradient‖",)
"""Columns for which a terminal has no room; they are on the page."""


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Invariance, prog="batchnorm reproduce invariance", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for found in (exact_table(summary), training_table(summary)):
        console.print(shown(found, f"{experiment.data}: {found.title}", left_out=LEFT_OUT))
    sys.stdout.write(
        f"With eps = {experiment.eps:g} the deviation is as calculated from eps/(a²σ²), to "
        f"{summary['agreement']:.1e} of it.\nReport: {experiment.out / 'report.html'}\n"
    )
