"""What an operation on a model did, what it left alone, and how closely the outputs agree."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """One thing that is different now.

    Attributes:
        where: Path in the model, such as ``layer1.0.conv1``.
        what: What happened there.
    """

    where: str
    what: str


@dataclass(frozen=True)
class Refusal:
    """One thing that was left alone.

    Attributes:
        where: Path in the model.
        reason: Why, and where possible what would help.
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Note:
    """Something to know about a change that was made.

    Attributes:
        where: Path in the model.
        what: What to know.
    """

    where: str
    what: str


@dataclass(frozen=True)
class SurgeryReport:
    """Everything that an operation did and did not do; ``print`` shows it as a table.

    Attributes:
        changes: In the order of the forward pass.
        refusals: What was left alone, each with its reason.
        notes: What to know about the changes.
        check: Largest difference between the outputs before and after, relative to the largest
            output; ``None`` where the operation is not meant to keep the outputs or has changed nothing.
    """

    changes: tuple[Change, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    notes: tuple[Note, ...] = ()
    check: float | None = None

    def __str__(self) -> str:
        parts = [
            table("changed", [(c.where, c.what) for c in self.changes]),
            table("left alone", [(r.where, r.reason) for r in self.refusals]),
            table("to know", [(n.where, n.what) for n in self.notes]),
        ]
        if self.check is not None:
            parts.append(f"largest output difference, relative: {self.check:.1e}")
        return "\n".join(part for part in parts if part) or "nothing to do"


def table(title: str, rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """Rows as aligned columns under a title with their number; empty without rows.

    Args:
        title: Above the rows.
        rows: All of the same length; an empty first cell stands for the model itself.
        head: Names of the columns, if they need any.
    """
    if not rows:
        return ""
    cells = [*([head] if head else []), *((row[0] or "(model)", *row[1:]) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]) - 1)]
    lines = ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in cells]
    return "\n".join([f"{title} ({len(rows)})", *("  " + line for line in lines)])
