"""Running statistics moved in one go: a layer of a hundred channels cannot afford ten operators for it."""

import math
from typing import Any

from numba import float64, int64
from numba.extending import register_jitable

from batchnorm.kernels.cpu_memory import argument, fetch, load, store


def move(kind: Any) -> Any:
    """The kernel of `cpu.move` for statistics of one kind, not yet compiled."""

    @register_jitable(error_model="numpy")
    def towards(running, new, share):
        # From the nearer end, so that a share of 1 arrives exactly.
        gap = new - running
        return running + share * gap if share < 0.5 else new - (1.0 - share) * gap

    @register_jitable(error_model="numpy")
    def kernel(block):
        C, count, tracked = argument(block, "C"), argument(block, "N"), argument(block, "tracked")
        mean, var = argument(block, "mean"), argument(block, "var")
        running_mean, running_var = argument(block, "running_mean"), argument(block, "running_var")
        # A sum is finite only if all of its terms are.
        probe = 0.0
        for c in range(C):
            probe += float64(load(mean, c, kind)) + float64(load(var, c, kind))
        if not math.isfinite(probe):
            return
        batches = fetch(tracked, 0, int64) + 1
        store(tracked, 0, batches)
        share = argument(block, "momentum")
        if share < 0:
            share = 1.0 / batches
        eps, inverted = argument(block, "eps"), argument(block, "given") != 0
        for c in range(C):
            biased = float64(load(var, c, kind))
            if inverted:
                biased = max(1.0 / (biased * biased) - eps, 0.0)
            old_mean, old_var = fetch(running_mean, c, kind), fetch(running_var, c, kind)
            unbiased = biased * (count / (count - 1.0))
            store(running_mean, c, kind(towards(old_mean, load(mean, c, kind), share)))
            store(running_var, c, kind(towards(old_var, unbiased, share)))

    return kernel
