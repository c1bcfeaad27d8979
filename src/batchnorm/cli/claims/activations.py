"""``batchnorm reproduce activations``."""

import sys

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.reproduce.activations import Activations, run_experiment


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its table and where the page is."""
    experiment = tyro.cli(Activations, prog="batchnorm reproduce activations", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    table = Table(
        "learning rate",
        "plain, at the end",
        "with BN",
        "difference",
        "plain's best, reached by BN",
        title=f"Test accuracy after {experiment.steps:,} steps, mean ± deviation of {experiment.seeds} seeds",
    )
    for row in summary["rates"]:
        final, speed_up = row["final"], row["speed_up"]
        times = (
            f"in {speed_up['median_ratio']:.1f} times fewer steps" if speed_up["median_ratio"] else "never"
        )
        table.add_row(
            f"{row['rate']:g}",
            percent(final["plain"]),
            percent(final["bn"]),
            percent(final["difference"], signed=True),
            f"{times} ({speed_up['reached']} of {experiment.seeds} seeds)",
        )
    console.print(table)
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")


def percent(spread: dict[str, float], *, signed: bool = False) -> str:
    """Mean ± deviation in percent."""
    sign = "+" if signed else ""
    return f"{100 * spread['mean']:{sign}.2f} ± {100 * spread['std']:.2f} %"
