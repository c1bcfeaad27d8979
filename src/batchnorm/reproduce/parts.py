"""An experiment in parts: each is a job of its own, kept in a file, and done once."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchnorm.data import load, num_cores
from batchnorm.files import write_json
from batchnorm.reproduce.claiming import claim_folder, science
from batchnorm.reproduce.pool import run_jobs
from batchnorm.reproduce.training import path_of
from batchnorm.train.run import environment


def keep(out: Path, name: str, found: Mapping[str, Any]) -> None:
    """Write what a part measured; numbers that are not finite become null, as JSON has none."""
    write_json(path_of(out, name), plain(found))


def run_in_parts(
    experiment: Any,
    parts: Mapping[str, tuple[Any, ...]],
    work: Callable[..., None],
    num_steps: Callable[[Any, str], int],
    summarize: Callable[[Any, dict[str, Any]], dict[str, Any]],
    write_report: Callable[[Mapping[str, Any], Path, Mapping[str, object]], Path],
    *,
    title: str,
) -> dict[str, Any]:
    """Parts, summary, pictures and page; a second call does only what is missing.

    Args:
        experiment: Dataclass with ``data``, ``data_dir``, ``out``, ``processes`` and its own settings.
        parts: As in `do_parts`; so is ``work``.
        num_steps: Of the experiment and a part's name.
        summarize: Of the experiment and what its parts measured.
        write_report: Of the summary, the folder, and the page's footer.
        title: Stands before the progress bar.

    Returns:
        The summary, which also stands in ``result.json``.

    Raises:
        ValueError, FileNotFoundError, ConnectionError, OSError: As `do_parts`.
    """
    settings = science(experiment)
    found = do_parts(
        experiment.out,
        settings,
        parts,
        work,
        source=experiment.data,
        data_dir=experiment.data_dir,
        num_steps=lambda name: num_steps(experiment, name),
        processes=experiment.processes,
        title=title,
    )
    summary = summarize(experiment, found)
    write_json(experiment.out / "result.json", summary)
    write_report(summary, experiment.out, footer(settings, experiment.processes, len(parts)))
    return summary


def do_parts(
    out: Path,
    settings: Mapping[str, object],
    parts: Mapping[str, tuple[Any, ...]],
    work: Callable[..., None],
    *,
    source: str,
    data_dir: Path | None,
    num_steps: Callable[[str], int],
    processes: int | None,
    title: str,
) -> dict[str, Any]:
    """Do the parts that are not yet done, and read all of them.

    Args:
        out: The experiment's folder; made if missing.
        settings: What decides the numbers, as JSON would hold it.
        parts: By name, the arguments of ``work``, which keeps its result by `keep`.
        work: A module-level function; it reports its steps by `pool.advance`.
        source: As in `batchnorm.data.load`.
        data_dir: Likewise.
        num_steps: How many steps the part of a name reports.
        processes: At most this many at once; one a core when None.
        title: Stands before the progress bar.

    Returns:
        What each part measured, by name.

    Raises:
        ValueError: The folder holds an experiment with other settings.
        FileNotFoundError, ConnectionError: The data are not to be had.
        OSError: The folder cannot be written; parts that were done stay done.
    """
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    claim_folder(out, settings)
    missing = [name for name in parts if _read(path_of(out, name)) is None]
    if missing:
        # Once here, so that a download or its error comes before any process is started.
        load(source, data_dir)
    if done := len(parts) - len(missing):
        print(f"{done} of {len(parts)} parts are already done in {out}", file=sys.stderr)
    start = time.perf_counter()
    steps = sum(num_steps(name) for name in missing)
    run_jobs(work, [parts[name] for name in missing], num_steps=steps, num_processes=processes, title=title)
    if missing:
        print(f"{title}: {len(missing)} parts in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {name: json.loads(path_of(out, name).read_text()) for name in parts}


def footer(settings: Mapping[str, object], processes: int | None, num_parts: int) -> dict[str, object]:
    """What the end of a page says: versions, machine, settings."""
    found = environment(torch.device("cpu"))
    return {
        **{name: found[name] for name in ("batchnorm", "torch", "python", "cpu")},
        "processes": f"{min(processes or num_cores(), num_parts)}, one thread each",
        "settings": json.dumps(settings),
    }


def check_counts(experiment: Any, *names: str) -> None:
    """Raise ``ValueError`` unless each of these fields is at least 1; one that is None is left alone."""
    for name in names:
        value = getattr(experiment, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_choices(name: str, chosen: Sequence[Any], known: Sequence[Any] | None = None) -> None:
    """Raise ``ValueError`` unless there is a choice, no choice comes twice, and each is known or positive."""
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"{name} must be at least one, and different from each other, got {chosen}")
    if known is not None and (unknown := [one for one in chosen if one not in known]):
        raise ValueError(f"{name} must be of {', '.join(map(str, known))}, got {unknown[0]!r}")
    if known is None and not min(chosen) > 0:
        raise ValueError(f"{name} must be positive, got {chosen}")


def log_grid(last: int, per_decade: int = 10) -> list[int]:
    """0, then whole numbers evenly spaced on a logarithmic scale, to ``last`` itself."""
    powers = np.arange(0, math.log10(last) + 1e-9, 1 / per_decade) if last > 1 else np.zeros(1)
    return sorted({0, *(round(10**power) for power in powers), last})


def plain(value: Any) -> Any:
    """``value`` in what JSON has: six digits of each number, and null for what is not finite."""
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
