"""What came out of the trials: a recommendation with its numbers, or that there is none."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import nn

from batchnorm.choosing.candidates import Settings, build
from batchnorm.choosing.verdict import BASELINE, Verdict
from batchnorm.files import write_bytes
from batchnorm.paired import Paired


@dataclass(frozen=True)
class Tried:
    """A candidate that was tried.

    Attributes:
        name: Of the candidate.
        about: What is in its model.
        rate: Its learning rate, the best of those tried for it.
        step_s: Seconds a step, the median.
        steps: After which it was evaluated.
        scores: One row for each repetition, one entry for each evaluation, shape (R, E).
        seconds: Spent in steps by then, likewise.
        diverged: In how many repetitions the loss was not finite; their rows are as long as they came.
    """

    name: str
    about: str
    rate: float
    step_s: float
    steps: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]
    seconds: tuple[tuple[float, ...], ...]
    diverged: int = 0

    @property
    def final(self) -> tuple[float, ...]:
        """Scores at the end, one for each repetition; empty if any diverged."""
        return () if self.diverged else tuple(row[-1] for row in self.scores)

    def after(self, seconds: float) -> tuple[float, ...]:
        """Scores after so much time in steps, between evaluations by a straight line, as `final`."""
        return () if self.diverged else tuple(map(lambda s, t: _at(t, s, seconds), self.scores, self.seconds))


@dataclass(frozen=True)
class Choice:
    """Trials of several kinds of normalization in one model; ``print`` shows them as a table.

    Attributes:
        tried: The candidates, the best first and those that diverged last.
        not_tried: Name and reason of those that were not.
        verdict: Which is best, and which of the others can be told from it.
        score: "accuracy" (share of held-out examples), "loss" (mean of held-out examples) or "metric".
        higher_is_better: Of the score.
        batch_size: Examples in a step.
        steps: Of each trial.
        repetitions: Trials of each candidate that were finished.
        num_held_out: Examples of which the score is the mean; 0 with a metric of the user's own.
        seconds: Spent in all.
        confidence: Of the verdict.
        settings: What candidates were built with.
        notes: What to know.
    """

    tried: tuple[Tried, ...]
    not_tried: tuple[tuple[str, str], ...]
    verdict: Verdict
    score: str
    higher_is_better: bool
    batch_size: int
    steps: int
    repetitions: int
    num_held_out: int
    seconds: float
    confidence: float
    settings: Settings
    notes: tuple[str, ...] = ()

    @property
    def recommended(self) -> str | None:
        """The candidate to take; None where the trials cannot tell that any is better than "plain"."""
        return self.verdict.recommended

    def apply(self, model: nn.Module, name: str | None = None) -> nn.Module:
        """A copy of a model with the recommended kind of normalization.

        Args:
            model: Not changed.
            name: A candidate in place of the recommended one.

        Raises:
            ValueError: None is recommended, and none named; or it cannot be put into this model.
        """
        name = self.recommended if name is None else name
        if name is None:
            raise ValueError(
                f"the trials cannot tell which is best ({self.sentence}). Name one that was tried: "
                f"{', '.join(repr(one.name) for one in self.tried)}"
            )
        return build(name, model, self.settings).model

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        verdict = self.verdict
        if verdict.best is None:
            return "every candidate diverged: give lower rates"
        others = [name for name in verdict.tied if name != BASELINE]
        if self.recommended is None:
            behind = BASELINE if BASELINE in verdict.tied else " or ".join(others)
            return f"cannot tell {verdict.best} from {behind}{self._more()}"
        if not verdict.differences:
            return f"take {verdict.best}: no other candidate could be compared"
        said = f"take {verdict.best}"
        if BASELINE in verdict.differences:
            said += f": {self._shown(verdict.differences[BASELINE])} better than {BASELINE}"
        if others:
            said += f"; it cannot be told from {' or '.join(others)}{self._more()}"
        return said

    def _more(self) -> str:
        needed = self.verdict.pairs_needed
        if self.repetitions < 2:
            return ", as one repetition shows no spread"
        if needed is None or needed > 100 * self.repetitions:
            return "; no reasonable number of repetitions would, as things stand"
        return f"; about {needed} repetitions would, {needed / self.repetitions:.1f} times this"

    def _shown(self, paired: Paired) -> str:
        if self.score == "accuracy":
            return f"{100 * paired.mean:.1f} ± {100 * paired.half_width:.1f} points"
        return f"{paired.mean:.3g} ± {paired.half_width:.2g} of {self.score}"

    @property
    def shortest_s(self) -> float:
        """Seconds that the fastest candidate spent in the steps of a trial."""
        return min(
            (min(row[-1] for row in one.seconds) for one in self.tried if not one.diverged), default=0.0
        )

    @property
    def fastest_to_score(self) -> str | None:
        """The candidate with the best mean score after `shortest_s`; None if all diverged."""
        sign = 1 if self.higher_is_better else -1
        means = {one.name: sign * fmean(one.after(self.shortest_s)) for one in self.tried if not one.diverged}
        return max(means, key=lambda name: means[name]) if means else None

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, under `columns`: one row for each candidate that was tried."""
        unit = 100 if self.score == "accuracy" else 1
        form = "{:.2f}" if self.score == "accuracy" else "{:.4g}"

        def spread(values: Sequence[float]) -> str:
            if not values:
                return "–"
            shown = form.format(unit * fmean(values))
            return shown + (f" ± {form.format(unit * stdev(values))}" if len(values) > 1 else "")

        found: list[tuple[str, ...]] = []
        for one in self.tried:
            difference = self.verdict.differences.get(one.name)
            behind = "" if difference is None else self._shown(difference)
            if difference is not None and not difference.is_told_apart:
                behind += " (not told apart)"
            if one.diverged:
                behind = f"diverged in {one.diverged} of {len(one.scores)}"
            found.append(
                (
                    one.name,
                    spread(one.final),
                    behind,
                    f"{1e3 * one.step_s:.3g} ms",
                    spread(one.after(self.shortest_s)),
                    f"{one.rate:g}",
                    one.about,
                )
            )
        return found

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table."""
        score = f"{self.score}, %" if self.score == "accuracy" else self.score
        return ("candidate", score, "behind the best", "a step", "in equal time", "rate", "what it is")

    @property
    def caption(self) -> str:
        """What the table is of."""
        on = f" on {self.num_held_out:,} examples held out" if self.num_held_out else ""
        return (
            f"batch size {self.batch_size}, {self.steps:,} steps, {self.repetitions} repetitions, "
            f"{self.seconds:.0f} s in all; {self.score}{on}, mean ± deviation; behind the best: intervals "
            f"hold together with {self.confidence:.0%}; in equal time: after that of the fastest"
        )

    def __str__(self) -> str:
        cells = [self.columns, *self.rows()]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        left = [f"not tried: {name}: {reason}" for name, reason in self.not_tried]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.sentence, "", *lines, self.caption, *left, *notes])

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        verdict = {
            **vars(self.verdict),
            "sentence": self.sentence,
            "differences": {
                name: {
                    "values": paired.values,
                    "mean": paired.mean,
                    "half_width": paired.half_width,
                    "told_apart": paired.is_told_apart,
                    "confidence": paired.confidence,
                }
                for name, paired in self.verdict.differences.items()
            },
        }
        whole = {**vars(self), "verdict": verdict, "settings": asdict(self.settings)}
        whole["tried"] = [vars(one) for one in self.tried]
        whole["not_tried"] = [{"name": name, "reason": reason} for name, reason in self.not_tried]
        plain: dict[str, Any] = _finite({"format": 1, **whole})
        return plain

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json` to a file, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        write_bytes(Path(path), (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        return Path(path)

    def write_page(self, path: str | os.PathLike[str], title: str = "Choice") -> Path:
        """Write one HTML page that opens offline: the table, and scores over steps and over time.

        Needs jinja2 and plotly (in ``batchnorm[train]``).

        Raises:
            OSError: The file cannot be written.
        """
        # The bare package has neither.
        from batchnorm.choosing.page import write_choice

        return write_choice(self, Path(path), title)


def _at(seconds: Sequence[float], scores: Sequence[float], moment: float) -> float:
    """The score at a moment on the line through those known; before the first, the first."""
    if moment <= seconds[0]:
        return scores[0]
    for k in range(1, len(seconds)):
        if moment <= seconds[k]:
            share = (moment - seconds[k - 1]) / (seconds[k] - seconds[k - 1])
            return scores[k - 1] + share * (scores[k] - scores[k - 1])
    return scores[-1]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
