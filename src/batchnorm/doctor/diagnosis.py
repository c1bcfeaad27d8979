"""What the doctor found: findings, the layers they are about, and the gap between training and inference."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchnorm.doctor.route import Stop
from batchnorm.files import write_bytes

LEVELS = ("wrong", "risk", "note")
"""What it does: inference is wrong now; training or a next step suffers; nothing but waste."""


@dataclass(frozen=True)
class Effect:
    """A quantity before and after the cure, both measured.

    Attributes:
        what: Its name, and its unit where it has one.
        before: On the model and data as they came.
        after: With the cure applied to a copy, or to the batches.
    """

    what: str
    before: float
    after: float

    @property
    def closed(self) -> float:
        """The share of ``before`` that the cure removes: 1 is all of it, below 0 it made things worse."""
        return 1 - self.after / self.before if self.before else 0.0

    def __str__(self) -> str:
        return f"{self.what} {self.before:.3g} → {self.after:.3g}"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        cause: A short fixed name, such as ``stale-statistics``.
        level: One of `LEVELS`.
        layers: Paths of the layers concerned, the one to look at first in front.
        evidence: What was measured, in words.
        numbers: The same by name.
        cure: What to do.
        effect: What the cure did when it was tried; None where it cannot be tried from here.
    """

    cause: str
    level: str
    layers: tuple[str, ...]
    evidence: str
    numbers: Mapping[str, float]
    cure: str
    effect: Effect | None = None


@dataclass(frozen=True)
class LayerFacts:
    """One normalization as the data met it; the lists have an entry for each channel.

    Attributes:
        name: Path in the model.
        kind: Class.
        channels: Their number.
        running_mean: Stored mean; empty if the layer keeps none, as is the next.
        running_var: Stored unbiased variance.
        mean: Of the data, with every layer before it normalizing by the data.
        var: Likewise, biased.
        mean_off: Distance of the stored mean from the data's, in deviations, root mean square over channels.
        std_off: Natural logarithm of the ratio of stored and true deviation, root mean square.
        noise: Deviation of a batch's mean in deviations of the samples, for the batches that came.
        histogram: Inputs at inference in deviations of the stored statistics, counts between
            `batchnorm.doctor.observe.BINS`.
    """

    name: str
    kind: str
    channels: int
    running_mean: tuple[float, ...]
    running_var: tuple[float, ...]
    mean: tuple[float, ...]
    var: tuple[float, ...]
    mean_off: float
    std_off: float
    noise: float
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Ranked findings; ``print`` shows them as a table, and an empty list means healthy.

    Attributes:
        findings: The worst first.
        layers: All normalizations that the data reached, in the order in which they do.
        inference_loss: Mean loss with running statistics; None where there is no loss.
        batch_loss: Mean loss with the statistics of mixed batches of the same data.
        distance: Between the outputs in the two modes, root mean square, in deviations of the outputs.
        num_batches: Batches looked at.
        num_examples: Examples in them.
        notes: What could not be looked at, and why.
        route: All modules that the data meet, in that order.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerFacts, ...]
    inference_loss: float | None
    batch_loss: float | None
    distance: float
    num_batches: int
    num_examples: int
    notes: tuple[str, ...] = ()
    route: tuple[Stop, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def gap(self) -> float:
        """Between training and inference: of the losses where there are any, else of the outputs."""
        if self.inference_loss is None or self.batch_loss is None:
            return self.distance
        return abs(self.inference_loss - self.batch_loss)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        plain = {
            "format": 1,
            "healthy": self.healthy,
            "gap": self.gap,
            "findings": [
                {
                    **vars(f),
                    "numbers": dict(f.numbers),
                    "effect": None if f.effect is None else _effect(f.effect),
                }
                for f in self.findings
            ],
            "layers": [vars(layer) for layer in self.layers],
            "route": [vars(stop) for stop in self.route],
        }
        rest = ("inference_loss", "batch_loss", "distance", "num_batches", "num_examples", "notes")
        finite: dict[str, Any] = _finite({**plain, **{name: getattr(self, name) for name in rest}})
        return finite

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json` to a file, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        write_bytes(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False).encode())
        return Path(path)

    def write_page(self, path: str | os.PathLike[str], title: str = "Diagnosis") -> Path:
        """Write one HTML page that opens offline: findings, a map of the network, each layer's distributions.

        Needs jinja2 (in ``batchnorm[train]``).

        Raises:
            OSError: The file cannot be written.
        """
        # The bare package has no jinja2.
        from batchnorm.doctor.page import write_page

        return write_page(self, path, title)

    def __str__(self) -> str:
        head = (
            f"{self.num_examples} examples in {self.num_batches} batches, {len(self.layers)} normalizations: "
        )
        if self.inference_loss is not None and self.batch_loss is not None:
            head += f"loss {self.inference_loss:.4g} at inference, {self.batch_loss:.4g} by batch"
        else:
            head += f"outputs at inference {self.distance:.2g} deviations from those by batch"
        lines = [head]
        if self.healthy:
            lines.append("nothing found")
        for number, finding in enumerate(self.findings, 1):
            lines.append(f"{number}. {finding.cause} ({finding.level}) at {_places(finding.layers)}")
            lines.append(f"   {finding.evidence}")
            lines.append(f"   cure: {finding.cure}")
            if finding.effect is not None:
                lines.append(f"   tried: {finding.effect}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _places(layers: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name or "(model)") for name in layers[:3])
    return (
        shown + (f" and {len(layers) - 3} more" if len(layers) > 3 else "") if layers else "the whole model"
    )


def _effect(effect: Effect) -> dict[str, Any]:
    return {**vars(effect), "closed": effect.closed}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (value == value and abs(value) != float("inf")):
        return None
    return value
