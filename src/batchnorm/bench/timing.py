"""Contenders timed in turns, so that whatever else the machine does meets all of them."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""PyTorch's own switch for huge pages in its CPU allocator, read at its first allocation."""


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
