"""``batchnorm reproduce activations``."""

import sys
from collections.abc import Mapping

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.reproduce.activations import Activations, run_experiment


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its table and where the page is."""
    experiment = tyro.cli(Activations, prog="batchnorm reproduce activations", args=argv)
    summary = run_experiment(experiment)
    table = Table(
        "rate",
        "without BN",
        "with BN",
        "difference",
        "speed-up",
        title=f"{experiment.data}: test accuracy (%) after {experiment.steps:,} steps, "
        f"{experiment.seeds} seeds",
        caption="speed-up: how many times fewer steps BN needs\n"
        "for the best accuracy of the network without it",
    )
    for row in summary["rates"]:
        final, ratio = row["final"], row["speed_up"]["median_ratio"]
        table.add_row(
            f"{row['rate']:g}",
            _spread(final["plain"]),
            _spread(final["bn"]),
            _spread(final["difference"], "+"),
            f"{ratio:.1f} ×" if ratio else "never",
        )
    Console().print(table)
    sys.stdout.write(f"Report: {experiment.out / 'report.html'}\n")


def _spread(values: Mapping[str, float], sign: str = "") -> str:
    return f"{100 * values['mean']:{sign}.2f} ± {100 * values['std']:.2f}"
