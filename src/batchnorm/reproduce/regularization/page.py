"""The report: section 3.4 beside what was measured."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from batchnorm.report import Claim, Page, Section, Table, draw, figure_of, write_page
from batchnorm.reproduce.regularization.charts import NAMES, gain_chart, score_chart
from batchnorm.reproduce.regularization.experiment import REFERENCE_BATCH

INTRO = """\
Section 3.4 of Ioffe & Szegedy (2015): under Batch Normalization a training example is seen together with
others of its mini-batch, so that the network no longer answers it with one certain value. The paper found
this to help generalization, and dropout, which is used against overfitting, to be removable or weaker.

Data: {data}; {examples:,} training images, so that networks overfit, and all test images. Every network sees
each image {epochs} times, whatever its batch size. {seeds} seeds; each has its own training images, initial
weights and order of examples, the same in every cell.

Learning rates: SGD with momentum 0.9, falling to zero along half a cosine. Each cell was trained at {rates}
(times batch / {reference}), and has the rate with the best mean accuracy on {held_out:,} images held out from
the training set, which nothing else uses. Tests are with population statistics of the training images.
"""

GAINS = """\
Each seed's difference between two networks that started alike and saw the same images. ± is the interval of
95 % by Student's t over the {seeds} seeds; for certain means that it excludes zero. It covers the seed, and
not the choice of this data set and these networks.
"""


def write_report(summary: Mapping[str, Any], out: Path, environment: Mapping[str, object]) -> Path:
    """Write the pictures and ``report.html`` into ``out``; returns the page's path.

    Raises:
        OSError: A file cannot be written.
    """
    settings = summary["experiment"]
    figures = {}
    for name, chart in (
        ("accuracy", score_chart(summary, "test")),
        ("gap", score_chart(summary, "gap")),
        ("gain", gain_chart(summary)),
    ):
        draw(chart, out / f"{name}.png", size=(8, 4.2))
        figures[name] = figure_of(chart.title, chart)
    rates = ", ".join(f"{rate:g}" for rate in settings["rates"])
    page = Page(
        f"Regularization: dropout, BN and the batch size, on {settings['data']}",
        INTRO.format(**{**settings, "rates": rates, "reference": REFERENCE_BATCH}),
        [
            Section("The claims", claims=claims(summary)),
            Section(
                "What dropout adds",
                GAINS.format(**settings),
                figures=[figures["gain"]],
                tables=[gain_table(summary), bn_table(summary)],
            ),
            Section(
                "All cells",
                figures=[figures["accuracy"], figures["gap"]],
                tables=[cell_table(summary), rate_table(summary)],
            ),
        ],
        environment,
    )
    return write_page(page, out / "report.html")


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """Section 3.4 in three sentences, each with what was measured."""
    return [_dropout_unnecessary(summary), _narrower_gap(summary), _better_test(summary)]


def _dropout_unnecessary(summary: Mapping[str, Any]) -> Claim:
    rows = summary["dropout"]
    chosen = {kind: _chosen(summary, kind) for kind in NAMES}
    shown = {
        kind: "; ".join(
            f"batch {size}: " + (points(None) if gain is None else f"{points(gain)} (p = {dropout:g})")
            for size, dropout, gain in found
        )
        for kind, found in chosen.items()
    }
    helps = {
        kind: sum(bool(gain and gain["told_apart"] and gain["mean"] > 0) for _, _, gain in found)
        for kind, found in chosen.items()
    }
    counts = {kind: _counts(rows, kind) for kind in NAMES}
    return Claim(
        "With BN, dropout is not needed.",
        "removed it: better validation accuracy",
        f"test accuracy that dropout adds, points: with BN {shown['bn']}. Without BN {shown['plain']}",
        "misses" if helps["bn"] and helps["bn"] >= helps["plain"] else _less(helps),
        "of the dropouts, the one with the better held-out accuracy; holds: helps for certain at some batch "
        "size without BN and at none with it; misses: with BN at as many as without; partly: else. Of all "
        f"{counts['bn'][2]} cells with BN dropout helps for certain in {counts['bn'][0]} and hurts in "
        f"{counts['bn'][1]}; without BN in {counts['plain'][0]} and {counts['plain'][1]}",
    )


def _less(helps: Mapping[str, int]) -> str:
    return "holds" if helps["plain"] and not helps["bn"] else "partly"


def _narrower_gap(summary: Mapping[str, Any]) -> Claim:
    rows = [row for row in summary["bn"] if row["dropout"] == 0]
    # A gap that BN narrows is a negative difference.
    wider, narrower, of = _counts(rows, "gap")
    return Claim(
        "BN regularizes: without dropout, training and test accuracy lie closer together.",
        "the network no longer gives one certain value",
        "change of the gap, points: " + _by_batch(rows, "gap"),
        "holds" if narrower == of else "partly" if narrower else "misses",
        f"narrower for certain in {narrower} of {of}, wider in {wider}",
    )


def _better_test(summary: Mapping[str, Any]) -> Claim:
    rows = [row for row in summary["bn"] if row["dropout"] == 0]
    better, worse, of = _counts(rows, "test")
    return Claim(
        "This helps generalization: test accuracy without dropout is higher with BN.",
        "found advantageous",
        "points: " + _by_batch(rows, "test"),
        "holds" if better == of else "partly" if better else "misses",
        f"better for certain in {better} of {of}, worse in {worse}; BN also trains faster, which this cannot "
        "tell apart from its noise",
    )


def _chosen(summary: Mapping[str, Any], kind: str) -> list[tuple[int, float, Mapping[str, Any] | None]]:
    """At each batch size the dropout of best held-out accuracy, and what it adds; None if all diverged."""
    found: list[tuple[int, float, Mapping[str, Any] | None]] = []
    for size in summary["experiment"]["batch_sizes"]:
        cells = [
            cell
            for cell in summary["cells"]
            if (cell["kind"], cell["batch_size"]) == (kind, size) and cell["dropout"] and cell["held_out"]
        ]
        if not cells:
            found.append((size, 0.0, None))
            continue
        dropout = max(cells, key=lambda cell: fmean(cell["held_out"]))["dropout"]
        row = next(r for r in summary["dropout"] if (r["batch_size"], r["dropout"]) == (size, dropout))
        found.append((size, dropout, row[kind]))
    return found


def _counts(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[int, int, int]:
    """How many are above zero for certain, below, and how many there are."""
    there = [row[name] for row in rows if row[name] is not None]
    above = sum(gain["told_apart"] and gain["mean"] > 0 for gain in there)
    below = sum(gain["told_apart"] and gain["mean"] < 0 for gain in there)
    return above, below, len(there)


def _by_batch(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    return "; ".join(f"batch {row['batch_size']}: {points(row[name])}" for row in rows)


def points(gain: Mapping[str, Any] | None) -> str:
    """Mean ± half width in points of a hundred."""
    if gain is None:
        return "all rates diverged"
    mean = _signed(gain["mean"])
    return mean if gain["half_width"] is None else f"{mean} ± {100 * gain['half_width']:.2f}"


def _signed(share: float) -> str:
    return f"{100 * share:+z.2f}".replace("-", "−")


def gain_table(summary: Mapping[str, Any]) -> Table:
    """What dropout adds with and without BN, and the difference of the two."""
    rows = [
        (
            row["batch_size"],
            f"{row['dropout']:g}",
            *map(points, (row["plain"], row["bn"], row["interaction"])),
        )
        for row in summary["dropout"]
    ]
    columns = ("batch size", "dropout", "without BN", "with BN", "with less without")
    return Table("Test accuracy that dropout adds, points", columns, rows)


def bn_table(summary: Mapping[str, Any]) -> Table:
    """What BN adds at each dropout."""
    rows = [
        (row["batch_size"], f"{row['dropout']:g}", points(row["test"]), points(row["gap"]))
        for row in summary["bn"]
    ]
    columns = ("batch size", "dropout", "test accuracy", "training less test")
    return Table("What BN adds, points", columns, rows)


def cell_table(summary: Mapping[str, Any]) -> Table:
    """Every cell at its rate."""
    rows = [
        (
            cell["batch_size"],
            NAMES[cell["kind"]],
            f"{cell['dropout']:g}",
            "–" if cell["rate"] is None else f"{cell['rate']:g}",
            *(spread(cell[name], _percent) for name in ("train", "test", "gap", "moving")),
            spread(cell["loss"], "{:.3f}".format),
        )
        for cell in summary["cells"]
    ]
    columns = (
        "batch size",
        "network",
        "dropout",
        "rate",
        "training, %",
        "test, %",
        "gap, points",
        "test, moving averages, %",
        "training loss",
    )
    caption = (
        "Mean ± deviation of the seeds. Training accuracy as tests are made: without dropout, with "
        "population statistics. Moving averages: with those that training left (momentum 0.1). Training "
        "loss: of the last epoch, with dropout and the batch's statistics."
    )
    return Table("Accuracy", columns, rows, caption)


def rate_table(summary: Mapping[str, Any]) -> Table:
    """Held-out accuracy of every cell at every rate."""
    rows = []
    for cell in summary["cells"]:
        shown = []
        for rate in cell["rates"]:
            if rate["held_out"] is None:
                shown.append(f"{rate['diverged']} diverged")
            else:
                best = "*" if rate["rate"] == cell["rate"] else ""
                shown.append(_percent(rate["held_out"]) + best)
        rows.append((cell["batch_size"], NAMES[cell["kind"]], f"{cell['dropout']:g}", *shown))
    columns = ("batch size", "network", "dropout", *(f"{rate:g}" for rate in summary["experiment"]["rates"]))
    return Table("Held-out accuracy (%) by learning rate", columns, rows, "*: the one chosen.")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def spread(values: Sequence[float] | None, form: Callable[[float], str]) -> str:
    """Mean ± deviation."""
    if values is None:
        return "diverged"
    return form(fmean(values)) + (f" ± {form(stdev(values))}" if len(values) > 1 else "")
