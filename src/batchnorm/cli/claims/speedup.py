"""``batchnorm reproduce speedup``."""

import sys

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.reproduce.speedup import Speedup, run_experiment
from batchnorm.reproduce.speedup.charts import shown_name
from batchnorm.reproduce.speedup.summary import percent


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its table and where the page is."""
    experiment = tyro.cli(Speedup, prog="batchnorm reproduce speedup", args=argv)
    summary = run_experiment(experiment)
    table = Table(
        "network",
        "best top-1",
        "fewer steps",
        "at plain's best rate",
        "paper: best",
        title=f"{experiment.data}: Inception with and without BN, {experiment.seeds} seeds",
        caption="fewer steps: how many times, to plain Inception's best accuracy; median of seeds",
    )
    for name, found in summary["networks"].items():
        ratios = (found[against]["median_ratio"] for against in ("against", "against_own_rate"))
        paper = found["paper"]
        table.add_row(
            shown_name(name),
            percent(found["best"]),
            *(f"{ratio:.1f} ×" if ratio else "never" for ratio in ratios),
            f"{100 * paper['best']:.1f} %" if paper else "–",
        )
    Console().print(table)
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")
