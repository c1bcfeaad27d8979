"""Independent jobs, one process a core, with one progress bar for all of them."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import torch

from batchnorm.data import num_cores

_steps_done: "Synchronized[int] | None" = None


def advance(num_steps: int) -> None:
    """Tell the progress bar of the parent process that this job did ``num_steps`` more."""
    if _steps_done is not None:
        with _steps_done.get_lock():
            _steps_done.value += num_steps


def _begin(counter: "Synchronized[int]") -> None:
    global _steps_done
    _steps_done = counter
    # One thread each: threads of several processes on the same cores wait for one another.
    torch.set_num_threads(1)


def run_jobs(
    work: Callable[..., None],
    jobs: Sequence[tuple[Any, ...]],
    *,
    num_steps: int,
    num_processes: int | None = None,
    title: str = "training",
) -> None:
    """Call ``work(*job)`` for every job, in fresh processes, in the given order.

    Args:
        work: A module-level function; it reports with `advance` and writes its own result.
        jobs: Arguments of each call.
        num_steps: All steps that the jobs will report, for the bar.
        num_processes: At most this many at once; the number of cores when ``None``.
        title: Stands before the bar.

    Raises:
        Exception: What a job raised; the jobs still waiting are not started.
        RuntimeError: A process was killed from outside.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    num_processes = max(1, min(num_processes or num_cores(), len(jobs)))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %  {task.fields[rate]} steps/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with (
        ProcessPoolExecutor(num_processes, context, initializer=_begin, initargs=(counter,)) as pool,
        Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
    ):
        task = bar.add_task(title, total=num_steps, rate="0")
        waiting = {pool.submit(work, *job) for job in jobs}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.25, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                speed = bar.tasks[0].speed
                bar.update(task, completed=counter.value, rate="…" if speed is None else f"{speed:,.0f}")
        except BrokenProcessPool:
            raise RuntimeError(
                f"{title}: a process was killed, perhaps for want of memory. What was finished is kept: "
                f"give the same command again, with fewer --processes if memory is short"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
