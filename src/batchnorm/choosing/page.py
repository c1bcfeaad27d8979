"""A choice as one HTML page: the verdict, the table, and scores on the way."""

from pathlib import Path

import numpy as np

from batchnorm.choosing.choice import Choice
from batchnorm.report import Curve, CurveChart, Page, Section, Table, figure_of, write_page

COLOURS = ("bn", "plain", "third", "fourth", "fifth", "#7a5c2e", "#1d6f78", "#a03050")


def charts(choice: Choice) -> list[CurveChart]:
    """Scores over steps and over time, of candidates that did not diverge."""
    standing = [one for one in choice.tried if not one.diverged]
    if not standing:
        return []
    over_steps, over_time = [], []
    unit = 100 if choice.score == "accuracy" else 1
    for index, one in enumerate(standing):
        colour = COLOURS[index % len(COLOURS)]
        scores = unit * np.array(one.scores)
        over_steps.append(Curve(one.name, np.array(one.steps), scores, colour))
        over_time.append(Curve(one.name, np.mean(one.seconds, axis=0), scores, colour))
    label = "accuracy, %" if choice.score == "accuracy" else choice.score
    return [
        CurveChart("Over steps", "step", label, over_steps),
        CurveChart("Over time", "seconds in steps", label, over_time),
    ]


def write_choice(choice: Choice, path: Path, title: str) -> Path:
    """Write the page, whole or not at all; it asks for nothing from outside.

    Raises:
        OSError: The file cannot be written.
    """
    sections = [
        Section(
            "The trials",
            "Every candidate starts from the same weights and sees the same batches in the same order; "
            "they take turns. Lines are medians of the repetitions, bands all that they reached.",
            figures=[figure_of(chart.title, chart) for chart in charts(choice)],
            tables=[Table("Candidates", choice.columns, choice.rows(), choice.caption)],
        )
    ]
    if choice.not_tried:
        sections.append(
            Section("Not tried", tables=[Table("Why not", ("candidate", "reason"), choice.not_tried)])
        )
    if choice.notes:
        sections.append(Section("To know", "\n\n".join(choice.notes)))
    first = choice.sentence[0].upper() + choice.sentence[1:] + "."
    return write_page(Page(title, first, sections), path)
