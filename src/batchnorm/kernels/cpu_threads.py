"""Running a compiled kernel on torch's own threads.

A second OpenMP runtime beside torch's (as numba would load) makes two sets of spinning threads
fight for the cores, so kernels are given to the runtime that libtorch itself is linked with.
"""

import ctypes
import logging
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

LOG = logging.getLogger("batchnorm")

FIELDS = (
    *("thread_of", "threads_of", "thread", "threads"),
    *("run", "splits", "given", "N", "C", "S", "chunk", "streams", "dy_pitch"),
    *("x", "y", "residual", "mask", "gamma", "beta", "mean", "var", "count", "scratch", "eps", "momentum"),
    *("dy", "dx", "dresidual", "dgamma", "dbeta"),
    *("running_mean", "running_var", "tracked"),
)
"""Fields of a kernel's block of arguments, 64 bits each: addresses (0: not given), sizes, and `DOUBLES`."""

DOUBLES = ("eps", "momentum")

PACK = struct.Struct("=" + "".join("d" if name in DOUBLES else "q" for name in FIELDS[4:])).pack
"""All fields but the first four, which are the pool's business, to bytes."""

PARTIAL, MERGE, PREPARE, APPLY = 1, 2, 4, 8
"""Phases of a kernel, bits of its field ``run``: sums over parts of the data; parts merged; coefficients
of the channels; results. Forward runs them in this order, backward prepares first."""

_HEAD = struct.Struct("=4q").pack
_ALONE = _HEAD(0, 0, 0, 1)

_forked = False


class Compiled(NamedTuple):
    """A kernel in machine code: ``call(block)``, and the address of the same function."""

    call: Callable[[bytes], None]
    address: int


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    # Threads of a pool do not live on in a forked child, and waiting for them would hang.
    os.register_at_fork(after_in_child=_mark_forked)


class _Pool(NamedTuple):
    """GOMP_parallel of the runtime that libtorch uses, and where a thread asks who it is."""

    parallel: Any
    head: bytes


@cache
def _openmp() -> _Pool | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        loaded = ctypes.CDLL(str(library))  # its own dependencies are searched, and found loaded
        parallel = loaded.GOMP_parallel
        who = [
            ctypes.cast(f, ctypes.c_void_p).value
            for f in (loaded.omp_get_thread_num, loaded.omp_get_num_threads)
        ]
    except (OSError, AttributeError) as error:
        LOG.info("kernels run on Python threads: torch's OpenMP pool was not found (%s)", error)
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return _Pool(parallel, _HEAD(*who, 0, 1))


@cache
def _python_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="batchnorm")


def num_threads() -> int:
    """Threads that a kernel may use: torch's setting; one in a forked child."""
    return 1 if _forked else torch.get_num_threads()


def run(kernel: Compiled, arguments: bytes, threads: int) -> None:
    """Run a kernel once on every one of ``threads`` threads, and wait for all.

    Args:
        kernel: Called on this thread where ``threads`` is 1.
        arguments: From `PACK`.
        threads: From `num_threads`, or fewer.
    """
    if threads == 1:
        kernel.call(_ALONE + arguments)
        return
    pool = _openmp()
    if pool is not None:
        pool.parallel(kernel.address, pool.head + arguments, threads, 0)
        return
    blocks = [_HEAD(0, 0, thread, threads) + arguments for thread in range(threads)]
    list(_python_threads().map(kernel.call, blocks))
