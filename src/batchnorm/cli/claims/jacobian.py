"""``batchnorm reproduce jacobian``."""

import sys

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.reproduce.jacobian import Jacobian, run_experiment
from batchnorm.reproduce.jacobian.page import gradient_table, spectrum_table


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Jacobian, prog="batchnorm reproduce jacobian", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for activation in experiment.activations:
        for found in (spectrum_table(summary, "paper", activation), gradient_table(summary, activation)):
            table = Table(*found.columns, title=f"{experiment.data}: {found.title}", caption=found.caption)
            for row in found.rows:
                table.add_row(*map(str, row))
            console.print(table)
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")
