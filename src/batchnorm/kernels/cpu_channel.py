"""One channel between the passes over its data: partial sums merged in order, coefficients derived.

Scratch holds, for every part of the data, three (forward) or two (backward) float64 vectors of
C, then the channels' coefficients: five vectors of C in "wide", the type that is computed in:
mean, scale, shift, and the two that ∂x takes off ∂z.
"""

import math

from numba import float64, int64
from numba.extending import register_jitable

from batchnorm.kernels.cpu_memory import argument, fetch, load, store

_inline = register_jitable(error_model="numpy")

FORWARD_SUMS, BACKWARD_SUMS = 3, 2
"""Vectors of sums that each part keeps."""


@_inline
def table_at(block, sums):
    """Address of the coefficients, after the parts' sums."""
    return argument(block, "scratch") + 8 * sums * argument(block, "splits") * argument(block, "C")


@_inline
def far(count, total, squares):
    """Whether a centre was further from the mean than a deviation, so that the squares around it mislead.

    The variance of samples is ``squares/count − (total/count)²``. By this test the second is never
    more than half of the first, so no digit of consequence cancels.
    """
    return count > 0 and 2.0 * total * total > squares * count


@_inline
def merged(count, mean, squares, more, centre, total, second):
    """Moments, and those of ``more`` samples known by their deviations from a centre, together.

    Source: Chan, Golub & LeVeque (1983).
    """
    if more == 0:
        return count, mean, squares
    local = centre + total / more
    around = second - total * (total / more)
    around = 0.0 if around < 0.0 else around
    gap = local - mean
    whole = count + more
    return whole, mean + gap * (more / whole), squares + around + gap * gap * (count * more / whole)


@_inline
def merge_moments(block, first, last, wide):
    """Mean, biased variance and count of some channels, from the moments of the parts."""
    C, scratch = argument(block, "C"), argument(block, "scratch")
    for part in range(1, argument(block, "splits")):
        for c in range(first, last):
            count, mean, squares = merged(
                fetch(scratch, c, float64),
                fetch(scratch, C + c, float64),
                fetch(scratch, 2 * C + c, float64),
                fetch(scratch, 3 * part * C + c, float64),
                fetch(scratch, (3 * part + 1) * C + c, float64),
                0.0,
                fetch(scratch, (3 * part + 2) * C + c, float64),
            )
            store(scratch, c, count)
            store(scratch, C + c, mean)
            store(scratch, 2 * C + c, squares)
    for c in range(first, last):
        count = fetch(scratch, c, float64)
        store(argument(block, "mean"), c, wide(fetch(scratch, C + c, float64)))
        store(argument(block, "var"), c, wide(fetch(scratch, 2 * C + c, float64) / max(count, 1.0)))
    if first == 0 and argument(block, "count") != 0:
        store(argument(block, "count"), 0, int64(fetch(scratch, 0, float64)))


@_inline
def _inv_std(block, c, wide):
    # From the variance as it is kept, so that backward finds the very z that forward had.
    return 1.0 / math.sqrt(float64(fetch(argument(block, "var"), c, wide)) + argument(block, "eps"))


@_inline
def prepare(block, first, last, wide, table):
    """Mean, scale and shift of some channels: z = (x − mean)·scale + shift."""
    C, gamma, beta = argument(block, "C"), argument(block, "gamma"), argument(block, "beta")
    for c in range(first, last):
        inv_std = _inv_std(block, c, wide)
        store(table, c, fetch(argument(block, "mean"), c, wide))
        store(table, C + c, wide(inv_std * load(gamma, c, wide) if gamma != 0 else inv_std))
        store(table, 2 * C + c, load(beta, c, wide) if beta != 0 else wide(0))


@_inline
def merge_gradients(block, first, last, wide, table):
    """∂γ, ∂β, and what ∂x takes off ∂z, from the parts' sums of ∂z and of ∂z·(x − mean)."""
    C, scratch = argument(block, "C"), argument(block, "scratch")
    for part in range(1, argument(block, "splits")):
        for c in range(first, last):
            total = fetch(scratch, c, float64) + fetch(scratch, 2 * part * C + c, float64)
            along = fetch(scratch, C + c, float64) + fetch(scratch, (2 * part + 1) * C + c, float64)
            store(scratch, c, total)
            store(scratch, C + c, along)
    share = 0.0
    if argument(block, "given") == 0:
        count = float64(argument(block, "N") * argument(block, "S"))
        if argument(block, "count") != 0:
            count = max(float64(fetch(argument(block, "count"), 0, int64)), 1.0)
        share = 1.0 / count
    for c in range(first, last):
        total, along = fetch(scratch, c, float64), fetch(scratch, C + c, float64)
        inv_std = _inv_std(block, c, wide)
        store(argument(block, "dgamma"), c, wide(along * inv_std))
        store(argument(block, "dbeta"), c, wide(total))
        store(table, 3 * C + c, wide(total * share))
        store(table, 4 * C + c, wide(along * inv_std * inv_std * share))
