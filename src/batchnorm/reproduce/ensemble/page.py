"""The report: figure 4 of the paper beside ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchnorm.report import Claim, Page, Section, Table, write_page

PAPER = (
    ("GoogLeNet ensemble", "224", "144", "7", "–", "6.67 %"),
    ("Deep Image low-res", "256", "–", "1", "–", "7.96 %"),
    ("Deep Image high-res", "512", "–", "1", "24.88 %", "7.42 %"),
    ("Deep Image ensemble", "variable", "–", "–", "–", "5.98 %"),
    ("BN-Inception single crop", "224", "1", "1", "25.2 %", "7.82 %"),
    ("BN-Inception multicrop", "224", "144", "1", "21.99 %", "5.82 %"),
    ("BN-Inception ensemble", "224", "144", "6", "20.1 %", "4.9 %"),
)
"""Figure 4, on ImageNet's validation set: model, resolution, crops, models, top-1 and top-5 error."""

INTRO = """\
Section 4.2.3 of Ioffe & Szegedy (2015): six networks, each BN-x30 with some of: larger initial weights in
the convolutions, 5 or 10 % dropout, BN per activation in the last hidden layers. The prediction of an
ensemble is the arithmetic mean of its members' class probabilities, and so is that of many crops.

The paper trains on ImageNet. Here it is {data} at 32×32 pixels, {width:g} of the channels and one step
for 2,000. One crop is the image as it is. The paper cuts squares out of the enlarged image, as it does in
training; here training moves the image by up to 4 pixels, and {crops} crops are such images: {which},
each with its mirror image. Which member changes what, and by how much, the paper does not say.
"""


def write_report(summary: Mapping[str, Any], out: Path, environment: Mapping[str, object]) -> Path:
    """Write ``report.html`` into ``out``.

    Args:
        summary: As `summarize` gives it.
        out: An existing folder.
        environment: Names and values for the page's footer.

    Returns:
        The page's path.

    Raises:
        OSError: It cannot be written.
    """
    settings = summary["experiment"]
    which = "to the corners and in its place" if settings["crops"] == 10 else "on a grid of 8 × 9 places"
    sections = [
        Section("The claims", claims=claims(summary)),
        Section("Figure 4", tables=[errors_table(summary), paper_table()]),
        Section("The members", tables=[members_table(summary)]),
    ]
    page = Page("Crops and ensembles", INTRO.format(**settings, which=which), sections, environment)
    return write_page(page, out / "report.html")


def steps_down(summary: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Name, top-1 error and loss of a single crop, many crops, and all networks with many crops."""
    crops, errors = summary["experiment"]["crops"], summary["errors"]
    single, multi, together = errors["single"]["mean"], errors["multi"]["mean"], errors["multi"]["ensemble"]
    rows = (("one network, one crop", single), (f"one network, {crops} crops", multi))
    num = len(summary["changes"])
    return [
        (name, of["top1"], of["loss"]) for name, of in (*rows, (f"{num} networks, {crops} crops", together))
    ]


def claims(summary: Mapping[str, Any]) -> list[Claim]:
    """Section 4.2.3's steps, with what was measured."""
    (_, single, _), (_, multi, _), (_, together, _) = steps_down(summary)
    best = min(of["top1"] for of in summary["errors"]["multi"]["members"].values())
    return [
        Claim(
            "Many crops have a lower error than one.",
            "top-1 error 25.2 % → 21.99 %",
            f"{single:.2%} → {multi:.2%}, mean of the members",
            "holds" if multi < single else "misses",
        ),
        Claim(
            "All networks together have a lower error than one.",
            "top-1 error 21.99 % → 20.1 %",
            f"{multi:.2%} → {together:.2%} (best single member {best:.2%})",
            "holds" if together < min(multi, best) else "partly" if together < multi else "misses",
        ),
    ]


def errors_table(summary: Mapping[str, Any]) -> Table:
    """Our rows of figure 4."""
    crops, num = summary["experiment"]["crops"], len(summary["changes"])
    rows = [
        (name, views, models, f"{of['top1']:.2%}", f"{of['top5']:.2%}", f"{of['loss']:.4f}")
        for name, views, models, of in (
            ("single crop, mean of members", 1, 1, summary["errors"]["single"]["mean"]),
            ("multicrop, mean of members", crops, 1, summary["errors"]["multi"]["mean"]),
            ("ensemble, single crop", 1, num, summary["errors"]["single"]["ensemble"]),
            ("ensemble, multicrop", crops, num, summary["errors"]["multi"]["ensemble"]),
        )
    ]
    columns = ("model", "crops", "models", "top-1 error", "top-5 error", "loss, nats")
    return Table("Ours, on the test set", columns, rows)


def paper_table() -> Table:
    """Figure 4 itself."""
    columns = ("model", "resolution", "crops", "models", "top-1 error", "top-5 error")
    return Table("The paper's, on ImageNet's validation set", columns, PAPER)


def members_table(summary: Mapping[str, Any]) -> Table:
    """Every network by itself."""
    crops, errors = summary["experiment"]["crops"], summary["errors"]
    rows = [
        (
            name,
            change,
            *(f"{errors[kind]['members'][name]['top1']:.2%}" for kind in ("single", "multi")),
        )
        for name, change in summary["changes"].items()
    ]
    columns = ("member", "change of BN-x30", "top-1 error, one crop", f"top-1 error, {crops} crops")
    return Table("Members", columns, rows)
