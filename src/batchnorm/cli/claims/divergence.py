"""``batchnorm reproduce divergence``."""

import sys

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.reproduce.divergence import Divergence, run_experiment
from batchnorm.reproduce.divergence.page import outcome_table


def run(argv: list[str]) -> None:
    """Parse ``argv``, run the experiment, print its tables and where the page is."""
    experiment = tyro.cli(Divergence, prog="batchnorm reproduce divergence", args=argv)
    summary = run_experiment(experiment)
    console = Console()
    for activation in experiment.activations:
        outcome = outcome_table(summary, activation)
        table = Table(
            *outcome.columns,
            title=f"{experiment.data}, {activation}: training loss after {experiment.steps:,} steps "
            f"(knowing nothing: {summary['chance_loss']:.2f})",
            caption=f"range of {experiment.seeds} seeds; ∞: not finite, and the step",
        )
        for row in outcome.rows:
            table.add_row(*map(str, row))
        console.print(table)
    alone = summary["bias_alone"][0]
    sys.stdout.write(
        f"Only b learns, mean outside the gradient: ‖b‖ grows to {alone['largest_bias']:.3g}, x̂ moves by "
        f"{alone['moved']:.0e}, the loss by {alone['loss_moved']:.0e}.\n"
        f"Report: {experiment.out / 'report.html'}\n"
    )
