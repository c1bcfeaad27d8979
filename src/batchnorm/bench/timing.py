"""Contenders timed in turns, so that whatever else the machine does meets all of them."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from batchnorm.kernels import keep_freed_memory

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""PyTorch's own switch for huge pages in its CPU allocator, read at its first allocation."""

MemorySetting = Literal["default", "huge-pages", "kept"]
"""Where a process gets the CPU's memory from: the C library as it is, the same with huge pages
(PyTorch's switch), or freed memory kept for reuse (`batchnorm.kernels.keep_freed_memory`)."""

MEMORY: tuple[MemorySetting, ...] = ("default", "huge-pages", "kept")
"""Every setting of `MemorySetting`."""


@dataclass(frozen=True)
class Timing:
    """Seconds for one call: median and quartiles over rounds."""

    median_s: float
    low_s: float
    high_s: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> "Timing":
        """From one sample a round; needs at least two."""
        low, median, high = statistics.quantiles(samples, n=4)
        return cls(median, low, high, len(samples))


def in_turns(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 9, slice_s: float = 0.02
) -> dict[str, Timing]:
    """Time every contender once a round, in an order that rotates from round to round.

    Args:
        contenders: Calls without arguments, by name.
        rounds: Samples of each.
        slice_s: A sample repeats its call for at least about this long.

    Returns:
        Seconds for one call, by name.
    """
    repeats = {name: _repeats(call, slice_s) for name, call in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_sample(contenders[name], repeats[name]))
    return {name: Timing.of(taken) for name, taken in samples.items()}


def _repeats(call: Callable[[], object], slice_s: float) -> int:
    call()  # compiles, allocates, fills caches
    return max(1, round(slice_s / max(_sample(call, 1), 1e-7)))


def _sample(call: Callable[[], object], repeats: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_time(shape: tuple[int, ...], dtype: torch.dtype, *, fresh: bool) -> Callable[[], object]:
    """A plain copy of a tensor: into memory that is there already, or into newly allocated memory."""
    source = torch.randn(shape).to(dtype)
    if fresh:
        return source.clone
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@contextmanager
def process(memory: MemorySetting, threads: int = 0) -> Iterator[ProcessPoolExecutor]:
    """A fresh process, since PyTorch and the C library settle such things once.

    Args:
        memory: Its setting.
        threads: PyTorch's threads; 0 leaves its own choice.
    """
    context = multiprocessing.get_context("spawn")
    with (
        environment(**{HUGE_PAGES: str(int(memory == "huge-pages"))}),
        ProcessPoolExecutor(1, context, initializer=_settle, initargs=(memory, threads)) as pool,
    ):
        pool.submit(os.getpid).result()  # has started, so the environment may be put back
        yield pool


def _settle(memory: MemorySetting, threads: int) -> None:
    if memory == "kept" and (reason := keep_freed_memory()):
        raise RuntimeError(f"freed memory cannot be kept: {reason}")
    if threads:
        torch.set_num_threads(threads)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for processes started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
