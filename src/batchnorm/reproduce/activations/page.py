"""The report: the paper's claims beside our figures, as a page and as pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.report import Claim, Page, Section, Table, draw, figure_of, write_page
from batchnorm.reproduce.activations.charts import (
    NAMES,
    accuracy_charts,
    drift_chart,
    inputs_chart,
    overview_chart,
)
from batchnorm.reproduce.activations.summary import COMPARED_FROM_STEP, KINDS, percent

INTRO = """\
Section 4.1 of Ioffe & Szegedy (2015): binary 28×28 images, three fully connected hidden layers of
100 sigmoids, ten outputs, cross-entropy, {steps:,} steps of {batch_size} examples; each hidden layer
with and without Batch Normalization.

The paper gives neither learning rate nor initial scale. Here: plain SGD at {num_rates} rates, Gaussian
weights of deviation {init_std:g}, {seeds} seeds. Both networks of a seed start from the same weights and
see the same batches. Every accuracy is of the whole test set, with population statistics of
{statistics_examples:,} training images (all at once, so exact), never moving averages. Data: {data}.
"""

DRIFT = """\
For each of the sigmoids of a layer: how far the median of its input moves from one evaluation to the next, in
half the distance between its 15th and 85th percentiles at the first of the two (one deviation, if it were
Gaussian), per 1,000 steps; mean over all units and seeds. The path length is the sum of all moves over the
training, in the same widths. Learning rate {rate:g}.
"""


def write_report(summary: Mapping[str, Any], out: Path, environment: Mapping[str, object]) -> Path:
    """Write the pictures and ``report.html`` into ``out``.

    Args:
        summary: As `summarize` gives it.
        out: An existing folder.
        environment: Names and values for the page's footer.

    Returns:
        The page's path.

    Raises:
        OSError: A file cannot be written.
    """
    settings = summary["experiment"]
    headline = settings["headline_rate"]
    charts = accuracy_charts(summary)
    overview, inputs, drifts = overview_chart(summary), inputs_chart(summary), drift_chart(summary)
    for name, chart in (("accuracy", overview), ("inputs", inputs), ("drift", drifts)):
        draw(chart, out / f"{name}.png", size=(9, 4.2) if name != "inputs" else None)
    draw(charts[headline], out / "figure-1a.png")
    others = [rate for rate in charts if rate != headline]
    introduction = INTRO.format(**{**settings, "num_rates": len(settings["rates"])})
    sections = [
        Section("The claims", claims=claims(summary)),
        Section(
            "Figure 1(a): test accuracy",
            "The band reaches from the lowest seed to the highest.",
            figures=[figure_of(f"Learning rate {rate:g}", charts[rate]) for rate in (headline, *others)],
            tables=[final_table(summary), milestone_table(summary), speed_up_table(summary)],
        ),
        Section(
            "Figure 1(b, c): the input of one sigmoid of the last hidden layer",
            "Percentiles over test images. The unit is the one whose path length is the median of its "
            "layer: a typical unit, chosen by that rule and not by eye.",
            figures=[figure_of(f"Learning rate {headline:g}, seed 0", inputs)],
        ),
        Section(
            "Drift of all units",
            DRIFT.format(rate=headline),
            figures=[figure_of("How far the inputs of the sigmoids move", drifts)],
            tables=[path_table(summary)],
        ),
    ]
    page = Page("Activations with and without Batch Normalization", introduction, sections, environment)
    return write_page(page, out / "report.html")


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """Section 4.1's statements, with what was measured."""
    settings = summary["experiment"]
    headline = next(row for row in summary["rates"] if row["rate"] == settings["headline_rate"])
    rate = f"learning rate {headline['rate']:g}"
    difference, seeds = headline["final"]["difference"], settings["seeds"]
    ways = {
        kind: [layer["mean"] for layer in summary["distributions"][kind]["path_length"]] for kind in KINDS
    }
    ratios = [row["speed_up"]["median_ratio"] for row in summary["rates"]]
    above, compared = headline["mean_above"], headline["compared"]
    return [
        Claim(
            "The network with BN has the higher test accuracy all through training.",
            "shown as a curve",
            f"above at {above} of {compared} evaluations from step {COMPARED_FROM_STEP} on "
            f"(mean of {seeds} seeds); {headline['pairs_above']} of {compared * seeds} seed by seed",
            _verdict(above > compared / 2, above == compared),
            rate,
        ),
        Claim(
            "It ends at the higher accuracy.",
            "shown as a curve",
            f"{percent(difference, signed=True)} "
            f"({percent(headline['final']['plain'])} without, {percent(headline['final']['bn'])} with)",
            _verdict(difference["mean"] > 0, difference["min"] > 0),
            f"{rate}; mean ± deviation of {seeds} seeds, paired",
        ),
        Claim(
            "It trains faster.",
            "no number for this experiment (14 times fewer steps on ImageNet)",
            "; ".join(
                f"rate {row['rate']:g}: {ratio:.1f} times" if ratio else f"rate {row['rate']:g}: never"
                for row, ratio in zip(summary["rates"], ratios, strict=True)
            ),
            _verdict(max(ratios) > 1, min(ratios) > 1),
            "how many fewer steps BN needs for the best accuracy that the plain network ever has; "
            "median of seeds, evaluations as the clock",
        ),
        Claim(
            "The distribution of a sigmoid's input is much more stable with BN.",
            "shown for one unit of the last hidden layer",
            "; ".join(
                f"layer {layer}: {without:.1f} against {with_bn:.1f} widths"
                for layer, (without, with_bn) in enumerate(
                    zip(ways["plain"], ways["bn"], strict=True), start=1
                )
            ),
            _verdict(ways["bn"][-1] < ways["plain"][-1], all(np.array(ways["bn"]) < ways["plain"])),
            f"{rate}; path length without and with BN, mean over all units of a layer and all seeds",
        ),
    ]


def _verdict(partly: bool, wholly: bool) -> str:
    return "holds" if wholly else "partly" if partly else "misses"


def final_table(summary: Mapping[str, Any]) -> Table:
    """Accuracy at the end."""
    rows = [
        (
            f"{row['rate']:g}",
            *(percent(row["final"][which], signed=which == "difference") for which in (*KINDS, "difference")),
        )
        for row in summary["rates"]
    ]
    columns = ("learning rate", "without BN", "with BN", "difference")
    return Table(
        "Test accuracy at the end", columns, rows, "Mean ± deviation over seeds; differences are paired."
    )


def milestone_table(summary: Mapping[str, Any]) -> Table:
    """Steps to given accuracies."""
    rows = [
        (
            f"{row['rate']:g}",
            NAMES[kind],
            *("–" if step is None else step for step in row["milestones"][kind]),
        )
        for row in summary["rates"]
        for kind in KINDS
    ]
    columns = ("learning rate", "network", *(f"{100 * target:g} %" for target in summary["milestones"]))
    caption = "The evaluation by which half of the seeds have that accuracy; –: never."
    return Table("Steps to a given test accuracy", columns, rows, caption)


def speed_up_table(summary: Mapping[str, Any]) -> Table:
    """Steps to the plain network's best accuracy."""
    rows = [
        (
            f"{row['rate']:g}",
            seed,
            f"{100 * found['best']:.2f} %",
            found["plain_steps"],
            "never" if found["bn_steps"] is None else found["bn_steps"],
            "–" if found["ratio"] is None else f"{found['ratio']:.1f}",
        )
        for row in summary["rates"]
        for seed, found in enumerate(row["speed_up"]["seeds"])
    ]
    columns = ("learning rate", "seed", "best without BN", "at step", "with BN at step", "ratio")
    caption = "The first evaluation at which each network has the plain network's best accuracy."
    return Table("Steps to the plain network's best accuracy", columns, rows, caption)


def path_table(summary: Mapping[str, Any]) -> Table:
    """Path lengths of each layer."""
    lengths = [summary["distributions"][kind]["path_length"] for kind in KINDS]
    rows = [
        (layer, *(f"{found['mean']:.2f} ± {found['std']:.2f}" for found in pair))
        for layer, pair in enumerate(zip(*lengths, strict=True), start=1)
    ]
    return Table(
        "Path length",
        ("hidden layer", *(NAMES[kind] for kind in KINDS)),
        rows,
        "Mean ± deviation over seeds.",
    )
