"""The report: what adaptation brings in each domain, and what it does not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchnorm.report import Claim, Page, Section, Table, draw, figure_of, write_page
from batchnorm.reproduce.adaptation.charts import size_chart
from batchnorm.reproduce.adaptation.experiment import PAIRS
from batchnorm.reproduce.adaptation.job import BLENDED
from batchnorm.reproduce.adaptation.summary import deviation, gains, mean, rows

INTRO = """\
A network trained in one domain meets images of another: other digits, or its own with noise, blur, little
contrast, inverted, turned. Batch Normalization keeps a part of what it knows of its domain in statistics
that can be measured again without labels. There are three ways to do that; here is what each
brings, beside the same network trained in the domain itself.

Sources: {sources}. Seeds: {seeds}; mean ± standard deviation, accuracy in % on all test images. Adapted on
training images of the domain, without labels: on one batch of the size that a column names, or on a stream
of {stream:,} examples (or as many as there are), in batches. Trained there: with the labels of all training
images, for as long as the source; of each corruption at {strengths}.
"""

DOMAINS = """\
Grey images have 28×28 pixels. USPS comes in 16×16, which its digits fill: they are enlarged to 20×20
(bilinear) and put in the middle of 28×28, as MNIST's were made. Corruptions act on levels from 0 to 1:
Gaussian noise of the deviation named, cut off at 0 and 1; a Gaussian blur of that deviation in pixels;
contrast lowered to that share, towards each image's mean; inversion; rotation by the degrees named, to
either side.

Networks: for grey images three convolutions (5×5, 3×3, 3×3, stride 2, 16 to 64 channels), for colour nine
with shortcuts (16 to 64 channels, the first with stride 2), each with BN and ReLU, then the mean over places
and a linear layer. SGD with momentum 0.9 in batches of 128. On their own test images: {own}.
"""

REFUSED = """\
"Refused" is of how many seeds adapt would have refused the data, unless told to trust them: their
predictions before are too one-sided. It cannot know that the classes are mixed, as they are here, and that
it is the network which sees the same class everywhere.
"""


def write_report(summary: Mapping[str, Any], out: Path, environment: Mapping[str, object]) -> Path:
    """Write the pictures and ``report.html`` into ``out``; returns the page's path.

    Raises:
        OSError: A file cannot be written.
    """
    settings = summary["experiment"]
    own = ", ".join(f"{source} {shown(values)}" for source, values in summary["own"].items())
    sections = [
        Section("What came out", claims=claims(summary)),
        Section("Domains and networks", DOMAINS.format(own=own)),
    ]
    for source in settings["sources"]:
        if not summary["targets"][source]:
            continue
        chart = size_chart(summary, source)
        draw(chart, out / f"{source}.png", size=(8, 4.2))
        tables = [made(summary, source) for made in (statistics_table, blended_table, stream_table)]
        sections.append(
            Section(f"Trained on {source}", REFUSED, figures=[figure_of(chart.title, chart)], tables=tables)
        )
    strengths = "every strength" if settings["trained_there"] == "all" else "the middle strength"
    intro = INTRO.format(**{**settings, "sources": ", ".join(settings["sources"]), "strengths": strengths})
    return write_page(Page("Adaptation to other domains", intro, sections, environment), out / "report.html")


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """What the methods' papers say, with what was measured."""
    settings = summary["experiment"]
    largest, smallest = settings["examples"][-1], settings["examples"][0]
    made = [
        _pair(summary, source, target, f"statistics {largest}")
        for source, target, _ in rows(summary)
        if target == PAIRS.get(source)
    ]
    made.append(_corruptions(summary, f"statistics {largest}"))
    made.append(_few(summary, smallest))
    made.append(_entropy(summary, settings["stream_batches"][-1]))
    return made


def _pair(summary: Mapping[str, Any], source: str, target: str, run: str) -> Claim:
    of = summary["targets"][source][target]
    after, before, there = of["runs"][run]["accuracy"], of["before"], of["there"]
    gain = mean(after) - mean(before)
    spread = max(deviation(after), deviation(before))
    return Claim(
        f"New statistics alone adapt a network to another data set: {source} → {target}.",
        "Li et al. (2016), AdaBN",
        f"{shown(before)} before, {shown(after)} after; trained there {shown(there)}",
        "holds" if gain > spread else "misses" if gain < -spread else "partly",
        f"{run.split()[1]} examples; partly: within one standard deviation",
    )


def _corruptions(summary: Mapping[str, Any], run: str) -> Claim:
    found = {name: gain for name, gain in gains(summary, run).items() if len(name.split()) > 3}
    worse = [f"{name} {signed(gain)}" for name, gain in found.items() if gain < 0]
    own = [of for _, target, of in rows(summary) if " " in target and of["there"] is not None]
    gained = sum(mean(of["runs"][run]["accuracy"]) - mean(of["before"]) for of in own)
    closed = gained / sum(mean(of["there"]) - mean(of["before"]) for of in own)
    better = len(found) - len(worse)
    said = f"better in {better} of {len(found)} domains, by {signed(mean([*found.values()]))} points on "
    said += f"average; {closed:.0%} of the gaps to training there, taken together, are closed"
    return Claim(
        "They make networks robust to corrupted images.",
        "Schneider et al. (2020)",
        said + (f"; worse: {', '.join(worse)}" if worse else ""),
        "holds" if not worse else "partly" if len(worse) < len(found) / 4 else "misses",
        f"{run.split()[1]} examples; partly: worse in less than a quarter",
    )


def _few(summary: Mapping[str, Any], size: int) -> Claim:
    found = gains(summary, f"blended {size}", against=f"statistics {size}")
    one = gains(summary, f"blended {BLENDED}")
    better = sum(gain > 0 for gain in found.values())
    return Claim(
        "With few examples a blend with the stored statistics is better.",
        "Schneider et al. (2020)",
        f"{size} examples: better than new statistics in {better} of {len(found)} domains, by "
        f"{signed(mean([*found.values()]))} points on average; from a single image better than nothing in "
        f"{sum(gain > 0 for gain in one.values())}, by {signed(mean([*one.values()]))}",
        "holds" if better == len(found) else "partly" if 2 * better > len(found) else "misses",
        "a prior of 16 examples; partly: in more than half",
    )


def _entropy(summary: Mapping[str, Any], size: int) -> Claim:
    found = gains(summary, f"entropy stream {size}", against=f"statistics stream {size}")
    better = sum(gain > 0 for gain in found.values())
    undone = sum(sum(of["runs"][f"entropy stream {size}"]["undone"]) for _, _, of in rows(summary))
    return Claim(
        "Entropy minimization in γ and β improves on new statistics.",
        "Wang et al. (2021), Tent",
        f"better in {better} of {len(found)} domains, by {signed(mean([*found.values()]))} points on "
        f"average; {undone} of {len(found) * summary['experiment']['seeds']} collapsed and were undone",
        "holds" if better == len(found) else "partly" if 2 * better > len(found) else "misses",
        f"one pass over the stream in batches of {size}, Adam at rate 0.001; partly: in more than half",
    )


def shown(values: list[float]) -> str:
    """Mean ± standard deviation in %."""
    return f"{100 * mean(values):.1f} ± {100 * deviation(values):.1f}"


def signed(share: float) -> str:
    """Points, with a sign."""
    return f"{100 * share:+.1f}".replace("-", "−")


def statistics_table(summary: Mapping[str, Any], source: str) -> Table:
    """Before, with new statistics from one batch of each size, and trained there."""
    sizes = summary["experiment"]["examples"]
    columns = (
        "domain",
        "before",
        "refused",
        *(f"statistics {size}" for size in sizes),
        "trained there",
        "gap",
    )
    found = []
    for target, of in summary["targets"][source].items():
        after = [of["runs"][f"statistics {size}"]["accuracy"] for size in sizes]
        refused = f"{sum(of['refused'])} of {len(of['refused'])}"
        there = ("", "")
        if of["there"] is not None:
            there = (shown(of["there"]), signed(mean(of["there"]) - mean(after[-1])))
        found.append((target, shown(of["before"]), refused, *map(shown, after), *there))
    caption = f"gap: trained there less statistics of {sizes[-1]:,} examples, points"
    return Table("New statistics from one batch", columns, found, caption)


def blended_table(summary: Mapping[str, Any], source: str) -> Table:
    """Before, and with blended statistics from one batch of each size."""
    sizes = (BLENDED, *summary["experiment"]["examples"])
    columns = ("domain", "before", *(f"blended {size}" for size in sizes))
    found = [
        (target, shown(of["before"]), *(shown(of["runs"][f"blended {size}"]["accuracy"]) for size in sizes))
        for target, of in summary["targets"][source].items()
    ]
    return Table("Statistics blended with the stored ones, a prior of 16 examples", columns, found)


def stream_table(summary: Mapping[str, Any], source: str) -> Table:
    """Entropy beside statistics, on a stream of batches."""
    sizes = summary["experiment"]["stream_batches"]
    columns = ["domain", "before"]
    columns += [f"{method}, batches of {size}" for size in sizes for method in ("statistics", "entropy")]
    columns += ["entropy's predictions, nats: before", "after"]
    found = []
    for target, of in summary["targets"][source].items():
        cells = [target, shown(of["before"])]
        for size in sizes:
            for method in ("statistics", "entropy"):
                run = of["runs"][f"{method} stream {size}"]
                cells.append(shown(run["accuracy"]) + f" ({sum(run['undone'])} undone)" * any(run["undone"]))
        last = of["runs"][f"entropy stream {sizes[-1]}"]
        found.append((*cells, f"{mean(of['entropy']):.2f}", f"{mean(last['entropy']):.2f}"))
    title = f"Adapted on a stream of up to {summary['experiment']['stream']:,} examples"
    return Table(title, tuple(columns), found)
