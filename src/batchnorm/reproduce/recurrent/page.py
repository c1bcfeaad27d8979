"""The report: what was expected of recurrent BN beside what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.report import Claim, Page, Section, Table, draw, figure_of, write_page
from batchnorm.reproduce.recurrent.charts import accuracy_chart, gradient_chart, shown_name
from batchnorm.reproduce.recurrent.summary import middle_of

INTRO = """\
Section 5 of Ioffe & Szegedy (2015) leaves recurrent networks, where gradients vanish or explode most, to
later work. Cooijmans et al. (2017) did it: in an LSTM they normalize the product of the input and that of the
hidden state, each by itself, and the cell state before the output's tanh; with statistics of every time step
by itself, and γ that starts from 0.1.

Data: {data}. An LSTM of {hidden_size} units reads an image row by row ({row_steps:,} training steps) or pixel
by pixel, averaged down to at most {pixel_side} × {pixel_side} ({pixel_steps:,} steps), and its last hidden
state is classified. Batches of {batch_size}, RMSProp with momentum 0.9 at rate {rate:g}, gradients clipped at
norm {clip:g}, {seeds} seeds. The plain LSTM is also trained at {plain_rates}. Both start from the same
weights (recurrent ones orthogonal, forget gates with bias 1) and, in training, from a hidden state of
Gaussian noise of deviation {noise:g}.
"""

ACCURACY = """\
Accuracy along the way is that of the first {test_examples:,} test images, with running statistics and a state
of zeros; at the end that of all. Steps to a target are those of the first of {evaluations} evaluations that
reaches it: the lower median of the seeds, and in brackets each.
"""

GRADIENTS = """\
The gradient of the loss of a batch in the hidden state of each time step, through everything that follows;
of the first {batch_size} training images, in training mode; medians of the seeds. Curves are relative to the
last state, so that their left end says how much of the gradient reaches back; below 10⁻¹² they end.
"""


def write_report(summary: Mapping[str, Any], out: Path, environment: Mapping[str, object]) -> Path:
    """Write the pictures and ``report.html`` into ``out``; returns the page's path.

    Raises:
        OSError: A file cannot be written.
    """
    settings = summary["experiment"]
    sections = [Section("The claims", claims=claims(summary))]
    accuracies, gradients = [], []
    for task in settings["tasks"]:
        chart = accuracy_chart(summary, task)
        draw(chart, out / f"{task}-accuracy.png", size=(9, 4.2))
        accuracies.append(figure_of(chart.title, chart))
        for point, name in enumerate(("before", "after")):
            chart = gradient_chart(summary, task, point)
            draw(chart, out / f"{task}-gradients-{name}.png", size=(9, 4.2))
            gradients.append(figure_of(chart.title, chart))
    tables = [accuracy_table(summary, task) for task in settings["tasks"]]
    sections.append(Section("Accuracy", ACCURACY.format(**settings), figures=accuracies, tables=tables))
    tables = [gradient_table(summary, task) for task in settings["tasks"]]
    sections.append(
        Section("Gradients through time", GRADIENTS.format(**settings), figures=gradients, tables=tables)
    )
    rates = " and ".join(f"{rate:g}" for rate in settings["plain_rates"]) or "no other rate"
    intro = INTRO.format(**{**settings, "plain_rates": rates})
    page = Page("Recurrent batch normalization", intro, sections, environment)
    return write_page(page, out / "report.html")


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """What Cooijmans et al. found, with what was measured."""
    made = []
    for task in summary["experiment"]["tasks"]:
        made += [_faster(summary, task), _as_good(summary, task), _reaches_back(summary, task)]
    return made


def found_for(
    summary: Mapping[str, Any], task: str, kind: str, rate: float | None = None
) -> Mapping[str, Any]:
    """What was found for a kind of network, at the common rate unless another is given."""
    rate = summary["experiment"]["rate"] if rate is None else rate
    networks = summary["tasks"][task]["networks"]
    return next(one for one in networks if one["kind"] == kind and one["rate"] == rate)


def headline(summary: Mapping[str, Any]) -> str:
    """The kind with the first initial γ."""
    return f"bn-{summary['experiment']['gammas'][0]:g}"


def _faster(summary: Mapping[str, Any], task: str) -> Claim:
    of_task = summary["tasks"][task]
    normalized = found_for(summary, task, headline(summary))
    sayings, ratios = [], []
    for name, rate in (("plain", summary["experiment"]["rate"]), ("plain_at_best", of_task["best_rate"])):
        plain = found_for(summary, task, "plain", rate)
        theirs, ours = (middle_of(one["steps_to"][name]) for one in (plain, normalized))
        target = of_task["targets"][name]
        assert theirs is not None  # half of the seeds reach their median
        ratios.append(0.0 if ours is None else theirs / ours)
        sayings.append(
            f"to the median best accuracy of the LSTM at rate {rate:g}, {target:.1%}: {_steps(ours)} against "
            f"{theirs:,}" + ("" if ours is None else f": {theirs / ours:.1f}×")
        )
        if rate == summary["experiment"]["rate"] and rate == of_task["best_rate"]:
            break
    return Claim(
        f"A batch-normalized LSTM takes fewer steps: {task}.",
        "trains faster in every task shown",
        "; ".join(sayings),
        "holds" if min(ratios) > 1 else "partly" if ratios[0] > 1 else "misses",
        "steps, not seconds: one of them takes longer, see the table; partly: than the LSTM at the same rate",
    )


def _as_good(summary: Mapping[str, Any], task: str) -> Claim:
    best_rate = summary["tasks"][task]["best_rate"]
    plain = found_for(summary, task, "plain", best_rate)["final"]
    ours = found_for(summary, task, headline(summary))["final"]
    high, low = _mean(ours), _mean(plain)
    clear = high is not None and (low is None or high - low > _std(ours) + _std(plain))
    return Claim(
        f"It is at least as accurate at the end: {task}.",
        "99.0 against 98.9 %, pixel by pixel, 784 of them, trained to the end" if task == "pixels" else "",
        f"{_spread(ours)} against {_spread(plain)} % (LSTM at its best rate, {best_rate:g})",
        "holds" if clear else "partly" if high is not None and high >= (low or 0) else "misses",
        f"all test images, after {summary['experiment'][task[:-1] + '_steps']:,} steps; partly: not by more "
        "than the seeds' deviations",
    )


def _reaches_back(summary: Mapping[str, Any], task: str) -> Claim:
    kinds = ["plain", *(f"bn-{gamma:g}" for gamma in summary["experiment"]["gammas"])]
    ratios = {kind: _ratios(found_for(summary, task, kind), 0) for kind in kinds}
    smallest = ratios[headline(summary)]
    others = [ratio for kind, ratio in ratios.items() if kind not in ("plain", headline(summary))]
    text = "; ".join(
        f"{shown_name(found_for(summary, task, kind), rates=False)}: {_range(ratios[kind])}" for kind in kinds
    )
    # Level is nearest to 1 on a logarithmic scale.
    nearest = all(_far(smallest) < _far(other) for other in others)
    level = min(smallest) >= 0.1 and max(smallest) <= 10
    return Claim(
        f"A small initial γ keeps gradients through time alive: {task}.",
        "γ of 0.1 does, gradients vanish with γ of 1",
        f"gradient in the first state over that in the last, before training: {text}",
        "holds" if nearest and level else "partly" if nearest or level else "misses",
        "range of the seeds; partly: nearer to 1 than with a larger γ, or within a factor of 10",
    )


def _far(ratios: Sequence[float]) -> float:
    return float(np.median(np.abs(np.log(np.maximum(ratios, 1e-300)))))


def _ratios(network: Mapping[str, Any], point: int) -> list[float]:
    found = network["gradients"]
    return [ratio for ratio in found[point]["ratio"] if ratio is not None] if len(found) > point else []


def _steps(steps: int | None) -> str:
    return "never" if steps is None else f"{steps:,}"


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if len(there) == len(values) else None


def _std(values: Sequence[float | None]) -> float:
    return float(np.std([v for v in values if v is not None], ddof=1)) if len(values) > 1 else 0.0


def _spread(values: Sequence[float | None]) -> str:
    mean = _mean(values)
    return "not finite" if mean is None else f"{100 * mean:.1f} ± {100 * _std(values):.1f}"


def _range(values: Sequence[float]) -> str:
    if not values:
        return "not finite"
    low, high = (f"{value:.2g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} – {high}"


def accuracy_table(summary: Mapping[str, Any], task: str) -> Table:
    """Accuracy and steps of all networks of a task."""
    of_task = summary["tasks"][task]
    rows = []
    for one in of_task["networks"]:
        cells = [
            f"{_steps(middle_of(steps))} ({', '.join(map(_steps, steps))})"
            for steps in (one["steps_to"][name] for name in ("plain", "plain_at_best"))
        ]
        milliseconds = 1000 * float(np.median(one["seconds"])) / one["steps"][-1]
        rows.append(
            (shown_name(one), _spread(one["best"]), _spread(one["final"]), *cells, f"{milliseconds:.0f}")
        )
    targets = of_task["targets"]
    columns = (
        "network",
        "best on the way, %",
        "at the end, %",
        f"steps to {targets['plain']:.1%}",
        f"steps to {targets['plain_at_best']:.1%}",
        "ms a step",
    )
    caption = (
        "Mean ± deviation of the seeds. Targets: the median best of the plain LSTM at the common rate, and "
        f"at its best, {of_task['best_rate']:g}. A step's time is the processor's, with evaluations."
    )
    return Table(f"{task}: accuracy", columns, rows, caption)


def gradient_table(summary: Mapping[str, Any], task: str) -> Table:
    """First state's gradient over the last's."""
    rows = []
    for one in summary["tasks"][task]["networks"]:
        for index, point in enumerate(one["gradients"]):
            norms = point["norms"]
            rows.append(
                (shown_name(one), f"{point['step']:,}",
                 f"{np.median(point['loss']):.3g}", f"{norms[0]:.2g}", f"{norms[len(norms) // 2]:.2g}",
                 f"{norms[-1]:.2g}", _range(_ratios(one, index)))
            )  # fmt: skip
    columns = ("network", "step", "loss", "first", "middle", "last", "first / last")
    caption = "Norms of the gradient in h of the first, middle and last step; range of the seeds' ratios."
    return Table(f"{task}: gradients through time", columns, rows, caption)
