"""How the CPU's kernels go about a tensor: which kernel, in what parts, on how many threads."""

from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from batchnorm.kernels.cpu_build import Spec, compiled
from batchnorm.kernels.cpu_threads import APPLY, MERGE, PARTIAL, PREPARE, Compiled

KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16"}
"""Dtypes that there are kernels for, and what they hold their numbers as."""

_WHOLE = PARTIAL | MERGE | PREPARE | APPLY
_STEPS = {
    "forward": (PARTIAL, MERGE | PREPARE, APPLY),
    "apply": (0, PREPARE, APPLY),
    "backward": (PREPARE, PARTIAL, MERGE, APPLY),
    "apply_backward": (PREPARE, PARTIAL, MERGE, APPLY),
}
_SCRATCH = {"forward": 6, "apply": 6, "backward": 4, "apply_backward": 4}

_GRAIN = 16384  # elements that are worth a thread
_CHUNK, _TILE = 4096, 16384  # elements that are in a near cache still when they are looked at again
LINE = 64
"""Bytes of a cache line."""

_DEFAULT_CACHE = 2**25
_FEWEST_ROWS, _MOST_ROWS = 16, 256  # of a tile: its sums are float32, and cost to be merged
_CHANNELS = 1024  # that are worth a thread where nothing but sums is left to do


class Plan(NamedTuple):
    """What to run on tensors of one shape and layout.

    Attributes:
        kernel: For the layout, dtype and fusion.
        steps: Phases to run one after the other, each with its number of threads.
        sizes: The fields ``splits``, ``given``, ``N``, ``C``, ``S`` and ``chunk``.
        num_channels: C, of the tensor.
        wide: What is computed in.
        num_scratch: Numbers of float64 that the kernel needs beside its results.
        streams: Whether results are best written past the caches, if they begin with a cache line and
            their pages are not fresh ones, which are in a cache from being cleared.
    """

    kernel: Compiled
    steps: tuple[tuple[int, int], ...]
    sizes: tuple[int, ...]
    num_channels: int
    wide: torch.dtype
    num_scratch: int
    streams: bool


@lru_cache(maxsize=4096)
def plan(
    function: str,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    activation: str,
    has_residual: bool,
    has_mask: bool,
    threads: int,
) -> Plan | None:
    """The plan for one of the functions of `contract.Kernel`; ``None`` for a layout no kernel knows."""
    found = _layout(shape, strides)
    if found is None:
        return None
    room, N, C, S = found
    threads = max(min(threads, N * C * S // _GRAIN), 1)
    if room == "rows":
        splits, chunk = threads, min(max(_TILE // C, _FEWEST_ROWS), _MOST_ROWS)
    else:
        # Whole channels, unless some threads would then have to wait for others.
        splits = 1 if C % threads == 0 or 8 * threads <= C else threads
        chunk = S * (_CHUNK // S) if S < _CHUNK else _CHUNK
    if threads == 1 or (room == "planes" and splits == 1 and function != "apply"):
        phases = sum(_STEPS[function])
        steps: tuple[tuple[int, int], ...] = ((phases, threads),)
    else:
        alone = (MERGE, PREPARE, MERGE | PREPARE)
        few = max(min(threads, C // _CHANNELS), 1)
        steps = tuple((phase, few if phase in alone else threads) for phase in _STEPS[function] if phase)
    # A mask hides whole rows, which are skipped; among planes it needs loops of its own.
    fusion = (activation, has_residual) if room == "rows" else (activation, has_residual, has_mask)
    direction = "backward" if "backward" in function else "forward"
    return Plan(
        kernel=compiled(Spec(room, direction, KINDS[dtype], fusion)),
        steps=steps,
        sizes=(splits, int("apply" in function), N, C, S, chunk),
        num_channels=shape[1],
        wide=torch.float64 if dtype == torch.float64 else torch.float32,
        num_scratch=(_SCRATCH[function] * splits + 5) * C,
        streams=_streams(N * C * S, (S if room == "planes" else C) * dtype.itemsize, dtype.itemsize),
    )


def _streams(elements: int, run: int, size: int) -> bool:
    """Whether to write past the caches: whole lines, and more than a cache keeps beside what is read."""
    return run % LINE == 0 and 2 * elements * size > _cache_bytes()


@cache
def _cache_bytes() -> int:
    """Size of the last-level cache, or a common one where the system does not tell."""
    sizes = [_DEFAULT_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(1024 * int(text[:-1]))
    return max(sizes[1:] or sizes)


def _layout(shape: torch.Size, strides: tuple[int, ...]) -> tuple[str, int, int, int] | None:
    """ "planes" as (N, C, S), or "rows" as (N, C, 1)."""
    N, C = shape[0], shape[1]
    S = shape[2:].numel()
    if _is_adjacent(shape, strides):
        if S > 1:
            return "planes", N, C, S
        # A single channel is one run of numbers.
        return ("planes", 1, 1, N) if C == 1 else ("rows", N, C, 1)
    if _is_adjacent((N, *shape[2:], C), (strides[0], *strides[2:], strides[1])):
        return "rows", N * S, C, 1
    return None


@lru_cache(maxsize=4096)
def pitch(shape: torch.Size, strides: tuple[int, ...], others: tuple[int, ...]) -> int | None:
    """Elements from one row, or one example of planes, to the next of a tensor beside another.

    So a slice of a concatenation's gradient is read where it is.

    Args:
        shape: Of both.
        strides: Of the one that has a `plan`.
        others: Of the one that is asked about.

    Returns:
        ``None`` if within rows or examples the two lie differently.
    """
    room, N, C, S = _layout(shape, strides) or ("", 0, 0, 0)
    if others == strides:
        return C if room == "rows" else C * S
    if room == "planes" and shape[0] == N and _is_adjacent(shape[1:], others[1:]):
        return others[0]
    if room == "rows" and others[1] == 1:
        sizes, outer = (shape[0], *shape[2:]), (others[0], *others[2:])
        apart = next((s for n, s in zip(reversed(sizes), reversed(outer), strict=True) if n > 1), C)
        return apart if _is_adjacent(sizes, outer, apart) else None
    return None


def _is_adjacent(sizes: tuple[int, ...], strides: tuple[int, ...], apart: int = 1) -> bool:
    """Whether such elements follow each other in order, ``apart`` from one to the next."""
    expected = apart
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
