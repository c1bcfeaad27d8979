"""What an adaptation did, and how it is undone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from batchnorm.statistics.predictions import Predictions
from batchnorm.statistics.recalibration_report import LayerChange, counted, layer_table


@dataclass(frozen=True)
class AdaptationReport:
    """What `adapt` did; ``print`` it for a table.

    As a context manager it rolls back on leaving: the model is adapted inside the block alone.

    Attributes:
        method: "statistics", "blended" or "entropy".
        layers: The layers that got new statistics, in the order of the model's modules.
        num_examples: Examples that were used.
        num_batches: Batches they came in.
        before: Predictions of the first examples with the stored statistics. ``None`` where the model gives
            no logits, or none that are finite.
        after: Predictions of the same examples with the new ones.
        entropies: For "entropy": mean entropy of each step's batch before the step, nats.
        undone: Why everything was put back: the learning collapsed. ``None`` where it stands.
        notes: What was left alone and why, and what to know about the result.
    """

    method: str
    layers: tuple[LayerChange, ...]
    num_examples: int
    num_batches: int
    before: Predictions | None
    after: Predictions | None
    entropies: tuple[float, ...] = ()
    undone: str | None = None
    notes: tuple[str, ...] = ()
    _undo: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    def rollback(self) -> None:
        """Give the model back the statistics, and for "entropy" γ and β, of before, to the bit.

        What has been put into the same layers since is overwritten, too. A second time does the same.
        """
        self._undo()

    def __enter__(self) -> "AdaptationReport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rollback()

    def __str__(self) -> str:
        done = "measured" if self.undone else "adapted"
        title = f"{done} {counted(len(self.layers), 'layer')}, method {self.method!r}: "
        title += f"{counted(self.num_examples, 'example')} in {counted(self.num_batches, 'batch', 'es')}"
        lines = [title, *layer_table(self.layers)]
        if self.before is not None:
            lines.append(f"before: {self.before}")
        if self.after is not None:
            lines.append(f"after:  {self.after}")
        if self.undone:
            lines.append(f"undone: {self.undone}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
