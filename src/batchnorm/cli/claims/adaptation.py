"""``batchnorm reproduce adaptation``."""

import sys

import tyro
from rich.console import Console

from batchnorm.cli.tables import shown
from batchnorm.reproduce.adaptation import Adaptation, run_experiment
from batchnorm.reproduce.adaptation.page import batch_table, stream_table

LEFT_OUT = ("refused",)
"""Columns for which a terminal has no room; they are on the page."""


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Adaptation, prog="batchnorm reproduce adaptation", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for source, targets in summary["targets"].items():
        if targets:
            for found in (batch_table(summary, source), stream_table(summary, source)):
                console.print(shown(found, f"{source}: {found.title}", left_out=LEFT_OUT))
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")
