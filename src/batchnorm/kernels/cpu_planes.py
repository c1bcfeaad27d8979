"""BN of contiguous (N, C, S): each channel is N runs of S adjacent numbers.

One thread takes whole channels where there are enough of them: it reads a channel from memory
once, for its sums, and again from its cache, to apply them. Few channels are split into equal
ranges of their N·S positions, whose sums are merged in order. Given statistics need no sums, and
memory is walked through in its own order.

Legend: position p of a channel is location p % S of example p // S; a unit is one of the
``splits`` ranges of one channel; "wide" is what is computed with, float32 or float64.
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
    LINE,
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

# Sums may be taken in any order, as vector code must, but nothing is assumed finite.
_sums = register_jitable(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
_exact = register_jitable(error_model="numpy", fastmath={"contract"})


@_exact
def _cut(total, part, parts):
    """Where a part of ``total`` elements begins: with a cache line, whatever the kind of numbers."""
    begin = total * part // parts
    return begin - begin % LINE if part < parts else total


@_exact
def _range_of(block, unit):
    """Channel, part, and the first and end position of a unit."""
    splits, positions = argument(block, "splits"), argument(block, "N") * argument(block, "S")
    c = unit // splits
    part = unit - c * splits
    return c, part, _cut(positions, part, splits), _cut(positions, part + 1, splits)


@_exact
def _find(block, p):
    """Example and location of a position. A division: once for many runs, not once for each."""
    S = argument(block, "S")
    n = p // S
    return n, p - n * S


@_exact
def _step(block, n, i, num):
    """Example and location ``num`` positions on, in the same run or at the beginning of the next."""
    i += num
    return (n + 1, 0) if i == argument(block, "S") else (n, i)


def forward(kind: Any, activation: str, has_residual: bool, has_mask: bool) -> Any:
    """The kernel of `cpu.forward` and `cpu.apply` for one kind of numbers, not yet compiled."""
    wide, size = widened(kind), kind.bitwidth // 8
    transform, deviation = transform_of(kind, activation, has_residual, has_mask), deviation_of(kind)

    @_sums
    def around_run(x, mask, num, centre):
        count, total, squares = int64(0), wide(0), wide(0)
        for i in range(num):
            d = deviation(x, i, centre)
            if has_mask:
                shown = load(mask, i, uint8) != 0
                d = d if shown else wide(0)
                count += int64(shown)
            total += d
            squares += d * d
        return count if has_mask else num, float64(total), float64(squares)

    @_exact
    def around(block, c, begin, end, centre):
        """Samples that count, and the sums of their deviations from ``centre`` and of the squares."""
        x, mask = argument(block, "x"), argument(block, "mask")
        C, S = argument(block, "C"), argument(block, "S")
        count, total, squares = int64(0), 0.0, 0.0
        n, i = _find(block, begin)
        while begin < end:
            num = min(S - i, end - begin)
            at = ((n * C + c) * S + i) * size
            more, first, second = around_run(x + at, mask + begin, num, centre)
            count += more
            total += first
            squares += second
            begin += num
            n, i = _step(block, n, i, num)
        return float64(count), total, squares

    @_exact
    def moments(block, c, part, begin, end):
        C, scratch, chunk = argument(block, "C"), argument(block, "scratch"), argument(block, "chunk")
        x, mask = argument(block, "x"), argument(block, "mask")
        count, mean, squares = 0.0, 0.0, 0.0
        if begin < end and (not has_mask or load(mask, begin, uint8) != 0):
            n, i = _find(block, begin)
            mean = float64(widen(load(x, (n * C + c) * argument(block, "S") + i, kind)))
        while begin < end:
            stop = min(begin + chunk, end)
            centre = wide(mean)
            more, total, second = around(block, c, begin, stop, centre)
            if far(more, total, second):
                centre = wide(centre + total / more)
                more, total, second = around(block, c, begin, stop, centre)
            count, mean, squares = merged(count, mean, squares, more, centre, total, second)
            begin = stop
        store(scratch, 3 * part * C + c, count)
        store(scratch, (3 * part + 1) * C + c, mean)
        store(scratch, (3 * part + 2) * C + c, squares)

    @_exact
    def put(block, c, place, p, num, table, y):
        C, mask, at = argument(block, "C"), argument(block, "mask"), place * size
        x, residual = argument(block, "x"), argument(block, "residual")
        mean, scale = fetch(table, c, wide), fetch(table, C + c, wide)
        shift = fetch(table, 2 * C + c, wide)
        for i in range(num):
            store(y, i, transform(x + at, residual + at, mask + p, i, mean, scale, shift))

    @_exact
    def apply_run(block, c, place, p, num, table):
        y = argument(block, "y")
        if argument(block, "streams") == 0:
            put(block, c, place, p, num, table, y + place * size)
            return
        staged = stage()
        while num > 0:
            some = min(num, STAGE // size)
            put(block, c, place, p, some, table, staged)
            stream(y + place * size, staged, some * size)
            place, p, num = place + some, p + some, num - some

    @_exact
    def apply_channel(block, c, begin, end, table):
        C, S = argument(block, "C"), argument(block, "S")
        n, i = _find(block, begin)
        while begin < end:
            num = min(S - i, end - begin)
            apply_run(block, c, (n * C + c) * S + i, begin, num, table)
            begin += num
            n, i = _step(block, n, i, num)

    @_exact
    def apply_in_order(block, table):
        """Without sums to wait for, memory is best walked through from one end to the other."""
        C, S = argument(block, "C"), argument(block, "S")
        total = argument(block, "N") * C * S
        # In pieces of whole cache lines; what is left over is the last thread's.
        first, last = share(block, total // LINE)
        place, end = first * LINE, total if last == total // LINE else last * LINE
        run, i = _find(block, place)
        n = run // C
        c = run - n * C
        while place < end:
            num = min(S - i, end - place)
            apply_run(block, c, place, n * S + i, num, table)
            place += num
            run, i = _step(block, run, i, num)
            if run != n * C + c:
                n, c = (n + 1, 0) if c == C - 1 else (n, c + 1)

    @_exact
    def kernel(block):
        run, table, C = argument(block, "run"), table_at(block, FORWARD_SUMS), argument(block, "C")
        if argument(block, "given") != 0:
            if run & PREPARE:
                prepare(block, 0, C, wide, table)
            if run & APPLY:
                apply_in_order(block, table)
                settle(block)
            return
        first, last = share(block, C * argument(block, "splits"))
        for unit in range(first, last):
            c, part, begin, end = _range_of(block, unit)
            if run & PARTIAL:
                moments(block, c, part, begin, end)
            if run & MERGE and part == 0:
                merge_moments(block, c, c + 1, wide)
            if run & PREPARE and part == 0:
                prepare(block, c, c + 1, wide, table)
            if run & APPLY:
                apply_channel(block, c, begin, end, table)
        settle(block)

    return kernel


def backward(kind: Any, activation: str, has_residual: bool, has_mask: bool) -> Any:
    """The kernel of `cpu.backward` and `cpu.apply_backward`, not yet compiled."""
    wide, size = widened(kind), kind.bitwidth // 8
    gradient = gradient_of(kind, activation, has_residual, has_mask)
    deviation = deviation_of(kind)

    @_sums
    def sums_run(dy, x, extra, mask, num, mean, scale, shift, dresidual):
        total, along = wide(0), wide(0)
        for i in range(num):
            dz, d = gradient(dy, x, extra, mask, i, mean, scale, shift)
            total += dz
            along += dz * d
            if has_residual:
                store(dresidual, i, narrow(dz, kind))
        return float64(total), float64(along)

    @_exact
    def sums(block, c, part, begin, end, table):
        C, scratch, mask = argument(block, "C"), argument(block, "scratch"), argument(block, "mask")
        x, extra, chunk = argument(block, "x"), argument(block, "residual"), argument(block, "chunk")
        S, dy, pitch = argument(block, "S"), argument(block, "dy"), argument(block, "dy_pitch")
        dresidual = argument(block, "dresidual")
        mean, scale = fetch(table, c, wide), fetch(table, C + c, wide)
        shift, p, total, along = fetch(table, 2 * C + c, wide), begin, 0.0, 0.0
        n, i = _find(block, begin)
        while p < end:
            num = min(S - i, end - p, chunk)
            at, there = ((n * C + c) * S + i) * size, (n * pitch + c * S + i) * size
            given = (mask + p, num, mean, scale, shift, dresidual + at)
            more, further = sums_run(dy + there, x + at, extra + at, *given)
            total += more
            along += further
            p += num
            n, i = _step(block, n, i, num)
        store(scratch, 2 * part * C + c, total)
        store(scratch, (2 * part + 1) * C + c, along)

    @_exact
    def put(block, c, at, dy, p, num, table, dx):
        C, mask = argument(block, "C"), argument(block, "mask") + p
        x, extra = argument(block, "x") + at, argument(block, "residual") + at
        dresidual = argument(block, "dresidual") + at
        mean, scale = fetch(table, c, wide), fetch(table, C + c, wide)
        shift = fetch(table, 2 * C + c, wide)
        constant, slope = fetch(table, 3 * C + c, wide), fetch(table, 4 * C + c, wide)
        for i in range(num):
            if has_residual:
                # What the sums have stored: one tensor to read in place of two.
                dz, d = widen(fetch(dresidual, i, kind)), deviation(x, i, mean)
            else:
                dz, d = gradient(dy, x, extra, mask, i, mean, scale, shift)
            change = scale * ((dz - constant) - d * slope)
            if has_mask:
                change = change if load(mask, i, uint8) != 0 else wide(0)
            store(dx, i, narrow(change, kind))

    @_exact
    def apply(block, c, begin, end, table):
        dx, dy, pitch = argument(block, "dx"), argument(block, "dy"), argument(block, "dy_pitch")
        C, S, streams = argument(block, "C"), argument(block, "S"), argument(block, "streams") != 0
        staged = stage()
        n, i = _find(block, begin)
        p = begin
        while p < end:
            num = min(S - i, end - p)
            at, there = ((n * C + c) * S + i) * size, dy + (n * pitch + c * S + i) * size
            if streams:
                num = min(num, STAGE // size)
                put(block, c, at, there, p, num, table, staged)
                stream(dx + at, staged, num * size)
            else:
                put(block, c, at, there, p, num, table, dx + at)
            p += num
            n, i = _step(block, n, i, num)

    @_exact
    def kernel(block):
        run, table = argument(block, "run"), table_at(block, BACKWARD_SUMS)
        first, last = share(block, argument(block, "C") * argument(block, "splits"))
        for unit in range(first, last):
            c, part, begin, end = _range_of(block, unit)
            if run & PREPARE and part == 0:
                prepare(block, c, c + 1, wide, table)
            if run & PARTIAL:
                sums(block, c, part, begin, end, table)
            if run & MERGE and part == 0:
                merge_gradients(block, c, c + 1, wide, table)
            if run & APPLY:
                apply(block, c, begin, end, table)
        settle(block)

    return kernel
