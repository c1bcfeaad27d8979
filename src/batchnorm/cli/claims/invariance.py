"""``batchnorm reproduce invariance``."""

import sys

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.reproduce.invariance import Invariance, run_experiment
from batchnorm.reproduce.invariance.page import exact_table, training_table


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Invariance, prog="batchnorm reproduce invariance", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for found in (exact_table(summary), training_table(summary)):
        table = Table(*found.columns, title=f"{experiment.data}: {found.title}", caption=found.caption)
        for row in found.rows:
            table.add_row(*map(str, row))
        console.print(table)
    sys.stdout.write(
        f"With eps = {experiment.eps:g} the deviation is as calculated from eps/(a²σ²), to "
        f"{summary['agreement']:.1e} of it.\nReport: {experiment.out / 'report.html'}\n"
    )
