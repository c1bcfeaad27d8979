"""One HTML page that opens offline: claims, tables and plots."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from batchnorm.files import write_bytes

VERDICTS = ("holds", "partly", "misses", "")


@dataclass(frozen=True)
class Claim:
    """What the paper says beside what was measured.

    Attributes:
        text: The claim, in our own words.
        paper: The paper's figure.
        ours: Our figure, with its spread.
        verdict: "holds", "partly", "misses", or "" for a figure without a judgement.
        note: Conditions, seeds, what differs.

    Raises:
        ValueError: An unknown verdict.
    """

    text: str
    paper: str
    ours: str
    verdict: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(map(repr, VERDICTS))}, got {self.verdict!r}")


@dataclass(frozen=True)
class Table:
    """Rows of text or numbers under named columns.

    Raises:
        ValueError: A row has not one cell for each column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: row {index} has {len(row)} cells for {len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Figure:
    """A plot with a caption.

    Attributes:
        title: Above it.
        caption: Below it.
        plot: A plotly figure as a dictionary, such as `batchnorm.report.plot` makes; numpy arrays
            may be inside, and nan or infinite values become gaps.

    Raises:
        ValueError: ``plot`` has no ``"data"``.
    """

    title: str
    caption: str
    plot: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.plot.get("data"):
            raise ValueError(f'figure {self.title!r} needs a plotly figure with traces under "data"')


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (separated by blank lines), then claims, figures and tables."""

    title: str
    text: str = ""
    claims: Sequence[Claim] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """All of a report.

    Attributes:
        title: Of the page.
        intro: Paragraphs under it, separated by blank lines.
        sections: In order.
        environment: Names and values for the footer: versions, device, command.
    """

    title: str
    intro: str
    sections: Sequence[Section]
    environment: Mapping[str, object] = field(default_factory=dict)


def write_page(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write ``page`` as one HTML file that needs no network, whole or not at all.

    All text is escaped. plotly.js is inside, once, if there is any figure.

    Args:
        page: What to say.
        path: Where to; an older file is replaced.

    Returns:
        ``path``.

    Raises:
        OSError: The file cannot be written.
        TypeError: A figure holds something that JSON cannot.
    """
    environment = Environment(
        loader=PackageLoader("batchnorm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["paragraphs"] = lambda text: [p.strip() for p in text.split("\n\n") if p.strip()]
    environment.filters["is_number"] = lambda cell: isinstance(cell, int | float | np.number)
    plots = [figure.plot for section in page.sections for figure in section.figures]
    html = environment.get_template("page.html.jinja").render(
        page=page,
        plots=embedded(plots),
        plotly_js=Markup(get_plotlyjs()) if plots else "",
    )
    write_bytes(Path(path), html.encode())
    return Path(path)


def embedded(value: Any) -> Markup:
    """``value`` as JSON that can stand inside ``<script>``: arrays as lists, null for what is not finite.

    Raises:
        TypeError: It holds something that JSON cannot.
    """
    return Markup(_script_safe(json.dumps(_plain(value), allow_nan=False)))


def _plain(value: Any) -> Any:
    """``value`` in what JSON has: arrays as lists, and null for numbers that are not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _script_safe(text: str) -> str:
    # Inside <script>, only these could end it or start a comment; JSON knows their escapes.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
