"""The report: section 2's statements beside what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.report import Claim, Curve, CurveChart, Page, Section, Table, draw, figure_of, write_page
from batchnorm.reproduce.divergence.experiment import KINDS
from batchnorm.reproduce.divergence.summary import CHANCE_LOSS, blown_up, not_finite

INTRO = """\
Section 2 of Ioffe & Szegedy (2015): if a gradient step takes the statistics of a normalization for
constants, it moves parameters in a way that the next normalization undoes. A bias b whose mean is
subtracted grows without bound while the loss stands still; with scaling too, the model blows up.
Algorithm 1, which differentiates through the statistics, is the cure.

Data: {data}, binary images, batches of {batch_size}. Networks: three hidden layers of 100, Gaussian
weights of deviation {init_std:g}, biases 0, plain SGD, {steps:,} steps, {seeds} seeds, rates {rates_text}.
Every layer is W u + b, then the normalization, then the nonlinearity; the statistics are those of the batch
at hand, except where moving averages are named. Networks of a seed start from the same weights and see the
same batches.
"""

ALONE = """\
The section's example to the letter. u is the first layer of the paper's network on {bias_examples:,}
training images, all of which every step sees; x̂ = u + b − E[u + b], then sigmoids and the output layer.
Only b learns, and its gradient takes E (and the deviation, where there is one) for constants. As x̂ never
moves, neither does the gradient: b must lie on a straight line, −rate · steps · the first gradient.
"""

NETWORKS = """\
All parameters learn. “Outside”: the gradient takes the statistics for constants. “Mean inside” tells apart
what the missing gradient does from what a rate does that is too high for a network that is only centred.
The loss is that of training batches; {chance:.2f} is that of knowing nothing. Plots show the rate {rate:g}:
the median of the seeds and their range. A curve ends where numbers are no longer finite, or pass 10⁶; norms
below 10⁻⁸ are drawn there.
"""

SHADES = {
    "mean-outside": "#a84d0c",
    "mean-inside": "#2e9d68",
    "both-outside": "#e0701f",
    "moving-outside": "#f3b98d",
    "affine-outside": "#b65fc4",
    "algorithm-1": "#2b83d6",
}


def write_report(summary: Mapping[str, Any], out: Path, environment: Mapping[str, object]) -> Path:
    """Write the pictures and ``report.html`` into ``out``; returns the page's path.

    Raises:
        OSError: A file cannot be written.
    """
    settings = summary["experiment"]
    alone = alone_chart(summary)
    draw(alone, out / "bias.png", size=(8, 4.2))
    sections = [
        Section("The claims", claims=claims(summary)),
        Section(
            "Only b learns",
            ALONE.format(**settings),
            figures=[figure_of(f"Learning rate {settings['headline_rate']:g}, seed 0, float32", alone)],
            tables=[alone_table(summary)],
        ),
    ]
    text = NETWORKS.format(chance=CHANCE_LOSS, rate=settings["headline_rate"])
    for activation in settings["activations"]:
        charts = {quantity: network_chart(summary, activation, quantity) for quantity in ("bias", "loss")}
        for quantity, chart in charts.items():
            draw(chart, out / f"{activation}-{quantity}.png", size=(9, 4.2))
        figures = [figure_of(chart.title, chart) for chart in charts.values()]
        tables = [outcome_table(summary, activation), growth_table(summary, activation)]
        sections.append(Section(f"Whole networks, {activation}", text, figures=figures, tables=tables))
    rates_text = ", ".join(f"{rate:g}" for rate in settings["rates"])
    page = Page(
        "Normalization outside the gradient step",
        INTRO.format(**settings, rates_text=rates_text),
        sections,
        environment,
    )
    return write_page(page, out / "report.html")


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """Section 2's statements, with what was measured."""
    alone = [row for row in summary["bias_alone"] if not row["scales"]]
    low = alone[0]
    rows, settings = summary["networks"], summary["experiment"]
    num = settings["seeds"] * len(settings["rates"]) * len(settings["activations"])

    def count(kind: str, what: Any) -> int:
        return sum(what(rows[f"{activation}/{kind}"]) for activation in settings["activations"])

    def ends(kind: str) -> int:
        return count(kind, lambda networks: sum(map(blown_up, networks)))

    def lost(kind: str) -> int:
        return count(kind, not_finite)

    separated = _separated(summary, "both-outside")
    largest = max(
        float("inf") if bias is None else bias
        for a in settings["activations"]
        for n in rows[f"{a}/algorithm-1"]
        for bias in n["largest_bias"]
    )
    cured = ends("algorithm-1") == 0
    steps, rates = f"{settings['steps']:,} steps", len(settings["rates"])
    condition = f"{num} networks each: {settings['seeds']} seeds, {rates} rates, {steps}"
    return [
        Claim(
            "The gradient step moves b, and b grows without bound.",
            "Δb ∝ −∂ℓ/∂x̂ at every step",
            f"‖b‖ up to {low['largest_bias']:.3g}, proportional to the steps: off the straight line by at "
            f"most {low['off_line']:.1e} of it in float32, {alone[1]['off_line']:.1e} in float64",
            "holds" if low["off_line"] < 1e-3 and alone[1]["off_line"] < 1e-9 else "misses",
            f"only b learns; {low['runs']} runs of {settings['bias_steps']:,} steps, all rates and seeds",
        ),
        Claim(
            "Output and loss do not change.",
            "u + b − E[u + b] stays",
            f"x̂ moves by at most {low['moved']:.1e} in float32 ({low['roundings']:.2f} of what rounding of "
            f"u + b may do), {alone[1]['moved']:.1e} in float64; the loss by {low['loss_moved']:.1e} and "
            f"{alone[1]['loss_moved']:.1e}",
            "holds" if max(row["roundings"] for row in alone) <= 1 else "misses",
            "the same runs",
        ),
        Claim(
            "With scaling too, the model blows up.",
            "seen in initial experiments; no figures",
            f"{ends('both-outside')} of {num} networks end above the loss of knowing nothing, "
            f"{lost('both-outside')} of them not finite; with Algorithm 1 {ends('algorithm-1')} of {num}. "
            f"Growth of parameters slows down: ‖b‖ ∝ steps^{_exponents(summary, 'both-outside')}",
            "holds" if separated and lost("both-outside") else "partly" if separated else "misses",
            f"{condition}; partly: they fail to train where Algorithm 1 trains, but no number overflows",
        ),
        Claim(
            "Scaling makes it worse than the mean alone.",
            "“can get worse”",
            f"not finite: {lost('mean-outside')} of {num} with the mean alone, {lost('both-outside')} with "
            f"both; end above the loss of knowing nothing: {ends('mean-outside')} and {ends('both-outside')}",
            "holds" if ends("both-outside") > ends("mean-outside") else "misses",
            "dividing by a deviation that grows with the weights divides their gradients too",
        ),
        Claim(
            "With Algorithm 1 the gradient does not move b.",
            "follows from section 3",
            f"‖b‖ of all hidden layers never above {largest:.1e} (float32, from 0)",
            "holds" if largest < 1e-3 else "misses",
            condition,
        ),
        Claim(
            "Algorithm 1 trains at the same rates.",
            "the cure",
            f"{num - ends('algorithm-1')} of {num} end below the loss of knowing nothing. The others: "
            + "; ".join(
                f"{KINDS[kind].about}: {num - ends(kind)}" for kind in KINDS if kind != "algorithm-1"
            ),
            "holds" if cured else "partly",
            condition,
        ),
    ]


def _separated(summary: Mapping[str, Any], kind: str) -> bool:
    """Whether there is a rate at which every seed of this kind blows up and none of Algorithm 1's."""
    return any(
        blown_up(bad) == len(bad["final_loss"]) and blown_up(good) == 0
        for activation in summary["experiment"]["activations"]
        for bad, good in zip(
            summary["networks"][f"{activation}/{kind}"],
            summary["networks"][f"{activation}/algorithm-1"],
            strict=True,
        )
    )


def _exponents(summary: Mapping[str, Any], kind: str) -> str:
    settings = summary["experiment"]
    index = settings["rates"].index(settings["headline_rate"])
    found = [
        value
        for activation in settings["activations"]
        for value in summary["networks"][f"{activation}/{kind}"][index]["exponent"]
        if value is not None
    ]
    return span(found, "{:.2f}") + f" at rate {settings['headline_rate']:g}" if found else "?"


def span(values: Sequence[float | None], form: str) -> str:
    """The smallest and the largest, or the one there is; ∞ for what is not finite."""
    ordered = sorted(float("inf") if value is None else value for value in values)
    shown = ["∞" if np.isinf(value) else form.format(value) for value in ordered]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]}–{shown[-1]}"


def alone_chart(summary: Mapping[str, Any]) -> CurveChart:
    """‖b‖ and what moved, in the section's example."""
    curves = []
    for run, colour in zip(summary["bias_curves"], ("plain", "fourth"), strict=True):
        after = np.array(run["step"]) > 0
        about = "mean and deviation" if run["scales"] else "mean"
        for quantity, name, dashed in (("bias", "‖b‖", False), ("moved", "largest move of x̂", True)):
            values = np.maximum(np.array(run[quantity])[after], 1e-9)
            curves.append(Curve(f"{name}, {about}", np.array(run["step"])[after], values, colour, dashed))
    title = "Only b learns, statistics outside the gradient"
    return CurveChart(title, "steps", "norm, largest move", curves, log_x=True, log_y=True)


def network_chart(summary: Mapping[str, Any], activation: str, quantity: str) -> CurveChart:
    """Norm of hidden biases, or loss, over steps at the headline rate."""
    label = {"bias": "‖b‖ of hidden layers", "loss": "training loss, nats"}[quantity]
    curves = []
    for kind, about in KINDS.items():
        seeds = summary["curves"][f"{activation}/{kind}"]
        steps = max((seed["step"] for seed in seeds), key=len)
        runs = np.full((len(seeds), len(steps)), np.nan)
        for row, seed in zip(runs, seeds, strict=True):
            values = np.array(seed[quantity], dtype=float)
            # Overflowing numbers would flatten all else; a curve that leaves the picture ends there.
            row[: len(values)] = np.where(values < 1e6, np.maximum(values, 1e-8), np.nan)
        after = np.array(steps) > 0
        if np.isfinite(runs[:, after]).any():
            curves.append(Curve(about.about, np.array(steps)[after], runs[:, after], SHADES[kind]))
    title = f"{activation}, learning rate {summary['experiment']['headline_rate']:g}: {label}"
    reference = ("knowing nothing", CHANCE_LOSS) if quantity == "loss" else None
    return CurveChart(title, "steps", label, curves, log_x=True, log_y=True, reference=reference)


def alone_table(summary: Mapping[str, Any]) -> Table:
    """The worst of all runs of the section's example."""
    rows = [
        (
            "mean and deviation" if row["scales"] else "mean",
            row["dtype"],
            f"{row['largest_bias']:.4g}",
            span(row["exponent"], "{:.4f}"),
            f"{row['off_line']:.1e}",
            f"{row['moved']:.1e} ({row['roundings']:.2f})",
            f"{row['loss_moved']:.1e}",
        )
        for row in summary["bias_alone"]
    ]
    columns = ("subtracted, divided", "computed in", "largest ‖b‖", "‖b‖ ∝ steps to the power",
               "off the straight line", "x̂ moved (in roundings)", "loss moved")  # fmt: skip
    return Table("The worst of all rates, seeds and steps", columns, rows)


def outcome_table(summary: Mapping[str, Any], activation: str) -> Table:
    """How the networks end, by rate."""
    rows = []
    for kind, about in KINDS.items():
        networks = summary["networks"][f"{activation}/{kind}"]
        rows.append((about.about, *(_outcome(network) for network in networks)))
    columns = ("normalized by", *(f"rate {rate:g}" for rate in summary["experiment"]["rates"]))
    caption = (
        "Mean training loss over the last tenth of the steps, smallest and largest of the seeds. "
        "∞: not finite, at the step given (the first of the seeds)."
    )
    return Table("Loss at the end", columns, rows, caption)


def _outcome(network: Mapping[str, Any]) -> str:
    stops = [step for step in network["not_finite"] if step is not None]
    return span(network["final_loss"], "{:.3g}") + (f" (step {min(stops):,})" if stops else "")


def middle_loss(network: Mapping[str, Any]) -> str:
    """The median loss at the end for a narrow table; ∞ if any seed is not finite, and the first such step."""
    stops = [step for step in network["not_finite"] if step is not None]
    return f"∞ ({min(stops):,})" if stops else f"{network['median_loss']:.3g}"


def growth_table(summary: Mapping[str, Any], activation: str) -> Table:
    """How far parameters went, by rate."""
    rows = []
    for kind, about in KINDS.items():
        cells = []
        for network in summary["networks"][f"{activation}/{kind}"]:
            bias = max(float("inf") if value is None else value for value in network["largest_bias"])
            growth = max(float("inf") if value is None else value for value in network["growth"])
            # No line ends between the sign and its number.
            cells.append(f"{_short(bias)}; ×\u00a0{_short(growth)}")
        rows.append((about.about, *cells))
    columns = ("normalized by", *(f"rate {rate:g}" for rate in summary["experiment"]["rates"]))
    caption = (
        "Largest ‖b‖ of the hidden layers at any step; and by how much weights and biases of the hidden "
        "layers together have grown at the end (or the last step before ∞). The largest of the seeds."
    )
    return Table("Growth", columns, rows, caption)


def _short(value: float) -> str:
    if np.isinf(value):
        return "∞"
    return (
        f"{value:.1e}"
        if value >= 1e4 or value < 1e-2
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.3g}"
    )
