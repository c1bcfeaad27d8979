"""BN of (M, C): M samples of C adjacent channels, as features and channels-last images lie.

Each part of the samples is read in tiles that stay in a near cache, four rows at a time, and the
loops run over the channels; a channel's sums are "wide" within a tile and float64 beyond it.

Legend: a part is one of the ``splits`` equal ranges of the rows, a tile is ``chunk`` rows of it;
"wide" is what is computed with, float32 or float64; ``S`` is 1.
"""

from typing import Any

from numba import float64, int64, uint8
from numba.extending import register_jitable

from batchnorm.kernels.cpu_channel import (
    BACKWARD_SUMS,
    FORWARD_SUMS,
    far,
    merge_gradients,
    merge_moments,
    merged,
    prepare,
    table_at,
)
from batchnorm.kernels.cpu_elements import deviation_of, gradient_of, transform_of, widened
from batchnorm.kernels.cpu_memory import (
    STAGE,
    argument,
    fetch,
    load,
    narrow,
    settle,
    share,
    stage,
    store,
    stream,
    widen,
)
from batchnorm.kernels.cpu_threads import APPLY, MERGE, PARTIAL, PREPARE

# Loops over channels need no sum in another order than the rows', so none is allowed.
_exact = register_jitable(error_model="numpy", fastmath={"contract"})


@_exact
def _rows_of(block, part):
    """First and end row of a part."""
    splits, rows = argument(block, "splits"), argument(block, "N")
    return rows * part // splits, rows * (part + 1) // splits


def forward(kind: Any, activation: str, has_residual: bool) -> Any:
    """The kernel of `cpu.forward` and `cpu.apply` for one kind of numbers, not yet compiled."""
    wide, size = widened(kind), kind.bitwidth // 8
    wide_size = wide.bitwidth // 8
    transform = transform_of(kind, activation, has_residual, False)

    @_exact
    def around_row(x, C, centre, total, squares):
        for c in range(C):
            d = widen(load(x, c, kind)) - fetch(centre, c, wide)
            store(total, c, fetch(total, c, wide) + d)
            store(squares, c, fetch(squares, c, wide) + d * d)

    @_exact
    def around_four_rows(x, C, centre, total, squares):
        for c in range(C):
            middle = fetch(centre, c, wide)
            d0 = widen(load(x, c, kind)) - middle
            d1 = widen(load(x, C + c, kind)) - middle
            d2 = widen(load(x, 2 * C + c, kind)) - middle
            d3 = widen(load(x, 3 * C + c, kind)) - middle
            store(total, c, fetch(total, c, wide) + ((d0 + d1) + (d2 + d3)))
            store(squares, c, fetch(squares, c, wide) + ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)))

    @_exact
    def around(block, row, stop, centre, total, squares):
        """Samples of a tile that count; their deviations from ``centre`` and the squares, summed."""
        x, mask, C = argument(block, "x"), argument(block, "mask"), argument(block, "C")
        for c in range(C):
            store(total, c, wide(0))
            store(squares, c, wide(0))
        count = int64(0)
        while row < stop:
            at = x + row * C * size
            if mask == 0 and row + 4 <= stop:
                around_four_rows(at, C, centre, total, squares)
                count += 4
                row += 4
                continue
            if mask == 0 or load(mask, row, uint8) != 0:
                around_row(at, C, centre, total, squares)
                count += 1
            row += 1
        return float64(count)

    @_exact
    def moments(block, part, spare):
        x, mask, C = argument(block, "x"), argument(block, "mask"), argument(block, "C")
        counts = argument(block, "scratch") + 8 * 3 * part * C
        means, squares = counts + 8 * C, counts + 16 * C
        centre, total, second = spare, spare + wide_size * C, spare + 2 * wide_size * C
        row, end = _rows_of(block, part)
        if mask != 0:
            while row < end and load(mask, row, uint8) == 0:
                row += 1
        for c in range(C):
            store(counts, c, 0.0)
            store(squares, c, 0.0)
            store(means, c, float64(widen(load(x, row * C + c, kind))) if row < end else 0.0)
        while row < end:
            stop = min(row + argument(block, "chunk"), end)
            for c in range(C):
                store(centre, c, wide(fetch(means, c, float64)))
            more = around(block, row, stop, centre, total, second)
            again = False
            for c in range(C):
                again |= far(more, float64(fetch(total, c, wide)), float64(fetch(second, c, wide)))
            if again:
                for c in range(C):
                    store(centre, c, wide(fetch(centre, c, wide) + fetch(total, c, wide) / wide(more)))
                around(block, row, stop, centre, total, second)
            for c in range(C):
                count, mean, around_mean = merged(
                    fetch(counts, c, float64),
                    fetch(means, c, float64),
                    fetch(squares, c, float64),
                    more,
                    float64(fetch(centre, c, wide)),
                    float64(fetch(total, c, wide)),
                    float64(fetch(second, c, wide)),
                )
                store(counts, c, count)
                store(means, c, mean)
                store(squares, c, around_mean)
            row = stop

    @_exact
    def put(block, row, first, last, table, y):
        x, residual, C = argument(block, "x"), argument(block, "residual"), argument(block, "C")
        at = row * C * size
        if argument(block, "mask") != 0 and load(argument(block, "mask"), row, uint8) == 0:
            for c in range(first, last):
                store(y, c, narrow(wide(0), kind))
            return
        for c in range(first, last):
            mean, scale = fetch(table, c, wide), fetch(table, C + c, wide)
            shift = fetch(table, 2 * C + c, wide)
            store(y, c, transform(x + at, residual + at, 0, c, mean, scale, shift))

    @_exact
    def apply(block, part, table):
        y, C = argument(block, "y"), argument(block, "C")
        streams, staged = argument(block, "streams") != 0, stage()
        begin, end = _rows_of(block, part)
        for row in range(begin, end):
            at = y + row * C * size
            if not streams:
                put(block, row, 0, C, table, at)
                continue
            for first in range(0, C, STAGE // size):
                last = min(first + STAGE // size, C)
                put(block, row, first, last, table, staged - first * size)
                stream(at + first * size, staged, (last - first) * size)

    @_exact
    def kernel(block):
        run, C, splits = argument(block, "run"), argument(block, "C"), argument(block, "splits")
        table = table_at(block, FORWARD_SUMS)
        first, last = share(block, splits)
        if run & PARTIAL:
            for part in range(first, last):
                moments(block, part, table + (5 + 3 * part) * wide_size * C)
        if run & MERGE:
            merge_moments(block, *share(block, C), wide)
        if run & PREPARE:
            prepare(block, *share(block, C), wide, table)
        if run & APPLY:
            for part in range(first, last):
                apply(block, part, table)
            settle(block)

    return kernel


def backward(kind: Any, activation: str, has_residual: bool) -> Any:
    """The kernel of `cpu.backward` and `cpu.apply_backward`, not yet compiled."""
    wide, size = widened(kind), kind.bitwidth // 8
    wide_size = wide.bitwidth // 8
    gradient, deviation = gradient_of(kind, activation, has_residual, False), deviation_of(kind)

    @_exact
    def add_row(dy, x, extra, dz, C, table, total, along):
        for c in range(C):
            mean, scale = fetch(table, c, wide), fetch(table, C + c, wide)
            g, d = gradient(dy, x, extra, 0, c, mean, scale, fetch(table, 2 * C + c, wide))
            store(total, c, fetch(total, c, wide) + g)
            store(along, c, fetch(along, c, wide) + g * d)
            if has_residual:
                store(dz, c, narrow(g, kind))

    @_exact
    def add_two_rows(dy, x, C, pitch, table, total, along):
        step = C * size
        for c in range(C):
            mean, scale = fetch(table, c, wide), fetch(table, C + c, wide)
            shift = fetch(table, 2 * C + c, wide)
            g0, d0 = gradient(dy, x, 0, 0, c, mean, scale, shift)
            g1, d1 = gradient(dy + pitch, x + step, 0, 0, c, mean, scale, shift)
            store(total, c, fetch(total, c, wide) + (g0 + g1))
            store(along, c, fetch(along, c, wide) + (g0 * d0 + g1 * d1))

    @_exact
    def sums(block, part, table, spare):
        dy, x, extra = argument(block, "dy"), argument(block, "x"), argument(block, "residual")
        mask, C = argument(block, "mask"), argument(block, "C")
        pitch, dz = argument(block, "dy_pitch") * size, argument(block, "dresidual")
        totals = argument(block, "scratch") + 8 * 2 * part * C
        total, along = spare, spare + wide_size * C
        for c in range(2 * C):
            store(totals, c, 0.0)
        row, end = _rows_of(block, part)
        while row < end:
            stop = min(row + argument(block, "chunk"), end)
            for c in range(2 * C):
                store(total, c, wide(0))
            while row < stop:
                at = row * C * size
                # Of a third tensor, and one to write, a row at a time: memory is read ahead in few places.
                if not has_residual and mask == 0 and row + 2 <= stop:
                    add_two_rows(dy + row * pitch, x + at, C, pitch, table, total, along)
                    row += 2
                    continue
                if mask == 0 or load(mask, row, uint8) != 0:
                    add_row(dy + row * pitch, x + at, extra + at, dz + at, C, table, total, along)
                row += 1
            for c in range(2 * C):
                store(totals, c, fetch(totals, c, float64) + float64(fetch(total, c, wide)))

    @_exact
    def put(block, row, first, last, table, dx):
        x, extra, C = argument(block, "x"), argument(block, "residual"), argument(block, "C")
        dy, at = argument(block, "dy") + row * argument(block, "dy_pitch") * size, row * C * size
        dresidual = argument(block, "dresidual") + at
        if argument(block, "mask") != 0 and load(argument(block, "mask"), row, uint8) == 0:
            for c in range(first, last):
                store(dx, c, narrow(wide(0), kind))
                if has_residual:
                    store(dresidual, c, narrow(wide(0), kind))
            return
        for c in range(first, last):
            mean, scale = fetch(table, c, wide), fetch(table, C + c, wide)
            shift, constant = fetch(table, 2 * C + c, wide), fetch(table, 3 * C + c, wide)
            slope = fetch(table, 4 * C + c, wide)
            if has_residual:
                # What the sums have stored: one tensor to read in place of two.
                dz, d = widen(fetch(dresidual, c, kind)), deviation(x + at, c, mean)
            else:
                dz, d = gradient(dy, x + at, extra + at, 0, c, mean, scale, shift)
            store(dx, c, narrow(scale * ((dz - constant) - d * slope), kind))

    @_exact
    def apply(block, part, table):
        dx, C = argument(block, "dx"), argument(block, "C")
        streams, staged = argument(block, "streams") != 0, stage()
        begin, end = _rows_of(block, part)
        for row in range(begin, end):
            at = dx + row * C * size
            if not streams:
                put(block, row, 0, C, table, at)
                continue
            for first in range(0, C, STAGE // size):
                last = min(first + STAGE // size, C)
                put(block, row, first, last, table, staged - first * size)
                stream(at + first * size, staged, (last - first) * size)

    @_exact
    def kernel(block):
        run, C, splits = argument(block, "run"), argument(block, "C"), argument(block, "splits")
        table = table_at(block, BACKWARD_SUMS)
        first, last = share(block, splits)
        if run & PREPARE:
            prepare(block, *share(block, C), wide, table)
        if run & PARTIAL:
            for part in range(first, last):
                sums(block, part, table, table + (5 + 2 * part) * wide_size * C)
        if run & MERGE:
            merge_gradients(block, *share(block, C), wide, table)
        if run & APPLY:
            for part in range(first, last):
                apply(block, part, table)
            settle(block)

    return kernel
