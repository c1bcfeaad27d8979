"""``batchnorm reproduce divergence``."""

import sys

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.reproduce.divergence import Divergence, run_experiment
from batchnorm.reproduce.divergence.experiment import KINDS
from batchnorm.reproduce.divergence.page import middle_loss


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Divergence, prog="batchnorm reproduce divergence", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for activation in experiment.activations:
        table = Table(
            "normalized by",
            *(f"rate {rate:g}" for rate in experiment.rates),
            title=f"{experiment.data}, {activation}: training loss after {experiment.steps:,} steps "
            f"(knowing nothing: {summary['chance_loss']:.2f})",
            caption=f"median of {experiment.seeds} seeds; ∞: not finite, and the first such step",
        )
        for kind, about in KINDS.items():
            networks = summary["networks"][f"{activation}/{kind}"]
            table.add_row(about.about, *map(middle_loss, networks))
        console.print(table)
    alone = summary["bias_alone"][0]
    sys.stdout.write(
        f"Only b learns, mean outside the gradient: ‖b‖ grows to {alone['largest_bias']:.3g}, x̂ moves by "
        f"{alone['moved']:.0e}, the loss by {alone['loss_moved']:.0e}.\n"
        f"Report: {experiment.out / 'report.html'}\n"
    )
