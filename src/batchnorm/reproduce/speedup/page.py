"""The report: the paper's claims beside our figures, as a page and as pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchnorm.report import Claim, Page, Section, Table, draw, figure_of, write_page
from batchnorm.reproduce.speedup.charts import accuracy_chart, rates_chart, shown_name, sigmoid_chart
from batchnorm.reproduce.speedup.summary import CHANCE, PLAIN, percent

INTRO = """\
Section 4.2 of Ioffe & Szegedy (2015): an Inception network on images, plain, with Batch Normalization and
nothing else changed (BN-Baseline), and with all the changes that BN allows at 5 and 30 times the rate.

The paper trains on ImageNet. Here it is {data} at 32×32 pixels: the same body behind another first
convolution, {width:g} of the channels, and one step for 2,000: {steps:,} of 32 images for plain
Inception. Rates, their decay in epochs, momentum, L2, dropout and distortion are the paper's. {seeds} seeds;
all networks of a seed see the same images in the same order (but for what the changes of section 4.2.1 say
about order). Curves and best accuracies are of the first {examples:,} test images, with population
statistics.
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
    settings, networks = summary["experiment"], summary["networks"]
    charts = {"accuracy": accuracy_chart(summary), "rates": rates_chart(summary)}
    if summary["plain_sigmoid"] and "bn-x5-sigmoid" in networks:
        charts["sigmoid"] = sigmoid_chart(summary)
    for name, chart in charts.items():
        draw(chart, out / f"{name}.png", size=(9, 4.8))
    steps = summary["recipes"][PLAIN]["steps"]
    sections = [
        Section("The claims", claims=claims(summary)),
        Section(
            "Figure 2: accuracy against steps",
            "The band reaches from the lowest seed to the highest.",
            figures=[figure_of("All networks", charts["accuracy"])],
            tables=[networks_table(summary), ratios_table(summary)],
        ),
        Section(
            "Plain Inception at its own best rate",
            "So that nobody can say it was starved: the first seed at multiples of the paper's rate.",
            figures=[figure_of("Rates without BN", charts["rates"])],
            tables=[rates_table(summary)],
        ),
    ]
    if "sigmoid" in charts:
        sections.append(Section("Sigmoid", figures=[figure_of("Sigmoid for ReLU", charts["sigmoid"])]))
    if summary["ablations"]:
        text = "BN-x5 with one of the changes of section 4.2.1 undone, which is then as in plain Inception."
        sections.append(Section("One change undone at a time", text, tables=[ablations_table(summary)]))
    examples = summary["recipes"][PLAIN]["eval_examples"]
    intro = INTRO.format(**settings, steps=steps, examples=examples)
    page = Page("How many fewer steps a batch-normalized Inception needs", intro, sections, environment)
    return write_page(page, out / "report.html")


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """Section 4.2's statements, with what was measured."""
    networks = summary["networks"]
    made = [
        _faster(
            networks, "bn-baseline", "less than half its steps", "13.3 M steps against 31.0 M: 2.3 times", 2.0
        ),
        _faster(networks, "bn-x5", "far fewer steps", "2.1 M against 31.0 M: 14 times", 10.0),
        _faster(
            networks, "bn-x30", "few steps, though more than BN-x5", "2.7 M against 31.0 M: 11 times", 5.0
        ),
        _highest(networks),
        _sigmoid(summary),
        _diverges(summary),
    ]
    return [claim for claim in made if claim is not None]


def _faster(networks: Mapping[str, Any], name: str, how: str, paper: str, wanted: float) -> Claim | None:
    if name not in networks:
        return None
    found = networks[name]
    ratio, own = found["against"]["median_ratio"], found["against_own_rate"]["median_ratio"]
    each = ", ".join(f"{row['ratio']:.1f}" if row["ratio"] else "never" for row in found["against"]["seeds"])
    verdict = "misses" if not ratio or ratio <= 1 else "holds" if ratio >= wanted else "partly"
    return Claim(
        f"{shown_name(name)} has plain Inception's best accuracy after {how}.",
        paper,
        f"{_times(ratio)} fewer steps (seeds: {each}); {_times(own)} against plain at its own best rate",
        verdict,
        "evaluations as the clock; median of seeds",
    )


def _times(ratio: float | None) -> str:
    return f"{ratio:.1f} times" if ratio else "never"


def _highest(networks: Mapping[str, Any]) -> Claim | None:
    if "bn-x30" not in networks:
        return None
    means = {name: found["best"]["mean"] for name, found in networks.items()}
    order = sorted(means, key=lambda name: means[name], reverse=True)
    return Claim(
        "BN-x30 ends highest.",
        "74.8 % against 73.0 % (BN-x5), 72.7 % (BN-Baseline), 72.2 % (Inception)",
        "; ".join(f"{shown_name(name)} {percent(networks[name]['best'])}" for name in order),
        "holds" if order[0] == "bn-x30" else "partly" if means["bn-x30"] > means[PLAIN] else "misses",
        "best top-1 at any evaluation; mean ± deviation of seeds",
    )


def _sigmoid(summary: Mapping[str, Any]) -> Claim | None:
    plain, with_bn = summary["plain_sigmoid"], summary["networks"].get("bn-x5-sigmoid")
    if plain is None or with_bn is None:
        return None
    best = plain["best"] or CHANCE
    trained, at_chance = with_bn["best"]["min"] > 2 * CHANCE, best < 1.5 * CHANCE
    return Claim(
        "With sigmoids the network trains if it has BN, and stays at chance if not.",
        "69.8 % with BN; chance (1/1000) without",
        f"{percent(with_bn['best'])} with BN; {100 * best:.1f} % at best without (chance is 10 %)",
        "holds" if trained and at_chance else "partly" if trained else "misses",
    )


def _diverges(summary: Mapping[str, Any]) -> Claim | None:
    found = summary["rates"].get("5")
    if found is None:
        return None
    ended = found["diverged"]
    learned = (found["best"] or 0) > 2 * CHANCE
    ours = ended or f"finite to the end; {100 * found['best']:.1f} % at best"
    verdict = "holds" if ended else "misses" if learned else "partly"
    return Claim(
        "Plain Inception at five times the rate diverges.", "to machine infinity", ours, verdict, "one seed"
    )


def networks_table(summary: Mapping[str, Any]) -> Table:
    """Figure 3 beside ours."""
    rows = []
    for name, found in summary["networks"].items():
        paper = found["paper"]
        steps = [row["steps"] for row in found["against"]["seeds"]]
        reached = ", ".join("never" if s is None else f"{s:,}" for s in steps)
        theirs = "–" if paper is None else f"{100 * paper['best']:.1f} %"
        their_steps = (
            "–" if paper is None else "never" if not paper["steps"] else f"{paper['steps'] / 1e6:g} M"
        )
        rows.append((shown_name(name), percent(found["best"]), reached, theirs, their_steps))
    columns = (
        "network",
        "best top-1",
        "steps to plain's best, seed by seed",
        "paper: best",
        "paper: steps to 72.2 %",
    )
    return Table("The networks", columns, rows, "Mean ± deviation over seeds.")


def ratios_table(summary: Mapping[str, Any]) -> Table:
    """How many times fewer steps, seed by seed."""
    rows = [
        (
            shown_name(name),
            row["seed"],
            f"{100 * row['target']:.2f} %",
            row["rival_steps"],
            "never" if row["steps"] is None else row["steps"],
            f"{row['ratio']:.1f}" if row["ratio"] else "–",
            f"{own['ratio']:.1f}" if own["ratio"] else "–",
        )
        for name, found in summary["networks"].items()
        for row, own in zip(found["against"]["seeds"], found["against_own_rate"]["seeds"], strict=False)
    ]
    columns = (
        "network",
        "seed",
        "plain's best",
        "at step",
        "this one at step",
        "ratio",
        "ratio at plain's best rate",
    )
    return Table("Steps to plain Inception's best accuracy", columns, rows)


def rates_table(summary: Mapping[str, Any]) -> Table:
    """Plain Inception's rates."""
    rows = [
        (f"{found['rate']:g} (×{factor})", "–" if found["best"] is None else f"{100 * found['best']:.2f} %",
         found["diverged"] or "no")
        for factor, found in summary["rates"].items()
    ]  # fmt: skip
    return Table("Rates of plain Inception, first seed", ("rate", "best top-1", "diverged"), rows)


def ablations_table(summary: Mapping[str, Any]) -> Table:
    """What each change is worth."""
    rows = [
        (what, percent(found["best"]), percent(found["difference"], signed=True), found["best"]["num"])
        for what, found in summary["ablations"].items()
    ]
    columns = ("as in plain Inception", "best top-1", "difference from BN-x5", "seeds")
    return Table(
        "BN-x5 with one change undone", columns, rows, "Best at any evaluation; differences are paired."
    )
