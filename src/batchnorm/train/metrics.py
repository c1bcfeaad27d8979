"""What a run reports while it goes on: metrics.jsonl, TensorBoard and the terminal."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from batchnorm import files
from batchnorm.reading import parse_json

REFRESH_S = 0.2


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl; a last line cut short by a killed process is left out.

    Raises:
        ValueError: A line before the last is not a JSON object with a step, or steps do not increase.
    """
    if not path.exists():
        return []
    *lines, _unfinished = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            row["step"] + 0
            if rows and row["step"] <= rows[-1]["step"]:
                raise ValueError(f"step {row['step']} follows step {rows[-1]['step']}")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}, is damaged ({error!r}). Correct or delete that line to go on."
            ) from error
        rows.append(row)
    return rows


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, at once: the steps will be taken again and report again."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    files.write_bytes(path, b"".join(json.dumps(row).encode() + b"\n" for row in kept))


class MetricsLog:
    """Writes each row to metrics.jsonl and, if wanted, to TensorBoard.

    Args:
        path: metrics.jsonl; rows are appended.
        tensorboard: Folder of TensorBoard's events, or None for none.
        step: Steps taken before; what TensorBoard holds of later ones is hidden.

    Raises:
        ImportError: TensorBoard is wanted and not installed.
    """

    def __init__(self, path: Path, tensorboard: Path | None, step: int) -> None:
        self._path, self._events = path, tensorboard
        self._writer = None
        if tensorboard is not None:
            try:
                # Imported here: it takes long, and a library user may do without.
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    'TensorBoard is missing: pip install "batchnorm[train]", or pass tensorboard=False.'
                ) from error
            with files.explained(tensorboard):
                self._writer = SummaryWriter(str(tensorboard), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; every entry but `step` is a number, and becomes a curve in TensorBoard."""
        files.append_line(self._path, json.dumps(row, allow_nan=False))
        if self._writer is not None:
            with files.explained(self._events):
                for name, value in row.items():
                    if name != "step":
                        self._writer.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Force all rows to the disk."""
        if self._path.exists():
            files.sync_file(self._path)
        if self._writer is not None:
            with files.explained(self._events):
                self._writer.flush()

    def close(self) -> None:
        """Finish the TensorBoard file."""
        if self._writer is not None:
            with files.explained(self._events):
                self._writer.close()


class ProgressReport:
    """A bar on a terminal, plain lines elsewhere, both on standard error; a context manager.

    Args:
        total: Steps of the whole training.
        start: Steps taken before.
        shown: False for silence.

    Raises:
        ImportError: It shall be shown and rich is not installed.
    """

    def __init__(self, total: int, start: int, *, shown: bool = True) -> None:
        self._total, self._start, self._shown = total, start, shown
        self._began = self._drawn = time.perf_counter()
        self._latest: dict[str, float] = {}
        self._bar: Any = None
        if not shown:
            return
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        except ImportError as error:
            raise ImportError(
                'The progress bar needs rich: pip install "batchnorm[train]", or train(..., progress=False).'
            ) from error
        console = Console(stderr=True)
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=console
            )
            self._task = self._bar.add_task("", total=total, completed=start)
        else:
            self._print = console.print

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        """Tell that `step` steps are done; drawn a few times a second at most."""
        if self._bar is not None and time.perf_counter() - self._drawn >= REFRESH_S:
            self._draw(step)

    def row(self, row: dict[str, Any]) -> None:
        """Show a new row of metrics; without a terminal, one line for each evaluation."""
        self._latest.update({name: row[name] for name in ("loss", "accuracy") if name in row})
        if self._bar is not None:
            self._draw(row["step"])
        elif self._shown and "accuracy" in row:
            self._print(
                f"step {row['step']}/{self._total}  {self._describe(row['step'])}",
                highlight=False,
                soft_wrap=True,
            )

    def _draw(self, step: int) -> None:
        self._drawn = time.perf_counter()
        self._bar.update(self._task, completed=step, description=self._describe(step))

    def _describe(self, step: int) -> str:
        parts = []
        if "loss" in self._latest:
            parts.append(f"loss {self._latest['loss']:.4g}")
        if "accuracy" in self._latest:
            parts.append(f"accuracy {self._latest['accuracy']:.2%}")
        if step > self._start:
            per_s = (step - self._start) / (time.perf_counter() - self._began)
            minutes, seconds = divmod(round((self._total - step) / per_s), 60)
            parts.append(f"{per_s:.0f} steps/s  {minutes}:{seconds:02d} left")
        return "  ".join(parts)
