"""``batchnorm reproduce adaptation``."""

import sys
from collections.abc import Sequence
from dataclasses import replace

import tyro
from rich.console import Console

from batchnorm.cli.tables import shown
from batchnorm.reproduce.adaptation import Adaptation, run_experiment
from batchnorm.reproduce.adaptation.job import BLENDED
from batchnorm.reproduce.adaptation.page import blended_table, statistics_table, stream_table


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Adaptation, prog="batchnorm reproduce adaptation", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for source, targets in summary["targets"].items():
        if targets:
            for made in (statistics_table, blended_table, stream_table):
                found = made(summary, source)
                left_out = _left_out(experiment, found.columns)
                few = replace(found, caption="")
                console.print(shown(few, f"{source}: {found.title}", left_out=left_out))
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")


def _left_out(experiment: Adaptation, columns: Sequence[str]) -> list[str]:
    """Columns for which a terminal has no room; they are on the page."""
    shown = {
        "domain",
        "before",
        "trained there",
        f"statistics {experiment.examples[-1]}",
        f"blended {BLENDED}",
    }
    shown |= {f"{method}, batches of {experiment.stream_batches[-1]}" for method in ("statistics", "entropy")}
    return [name for name in columns if name not in shown]
