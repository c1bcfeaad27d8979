"""What the Triton kernels do with a tile: find it in memory, sum it, take and merge its moments.

Letters: N rows of the view, C channels, S locations; a tile has shape (BLOCK_N, BLOCK_C,
BLOCK_S) and vectors of channels (BLOCK_C,). `gpu_plan` chooses the cut.
"""

import triton
import triton.language as tl

COUNTS = ["N", "num_tiles", "tiles_per_split"]
"""What kernels are not specialized on, so that another batch size needs no other compilation."""


@triton.jit
def share_of(program, C, num_tiles, tiles_per_split, BLOCK_C: tl.constexpr):
    """A program's channels, its split, and its tiles from first to one past the last."""
    num_blocks = tl.cdiv(C, BLOCK_C)
    split = program // num_blocks
    c = (program % num_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = split * tiles_per_split
    return c, split, first, tl.minimum(first + tiles_per_split, num_tiles)


@triton.jit
def last_first():
    """This program's number from behind: what was read last is in the cache, so begin with it."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


@triton.jit
def locate(
    tile, c, mask_ptr, N, C, S, tiles_s, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, INDEX: tl.constexpr
):
    """Offsets of a tile's values, which of them exist, and which samples count.

    Shapes: offsets and ``inside`` (BLOCK_N, BLOCK_C, BLOCK_S), samples (BLOCK_N, 1, BLOCK_S).
    """
    n = tl.cast(tile // tiles_s, INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
    s = tl.cast(tile % tiles_s, INDEX) * BLOCK_S + tl.arange(0, BLOCK_S)[None, None, :]
    samples = (n < N) & (s < S)
    inside = samples & spread(c < C)
    offsets = (n * C + spread(c)) * S + s
    if mask_ptr is not None:
        samples = samples & (tl.load(mask_ptr + n * S + s, mask=samples, other=0) != 0)
    return offsets, inside, samples


@triton.jit
def spread(v):
    """A vector of channels, shaped so that it broadcasts over a tile."""
    return v[None, :, None]


@triton.jit
def total(t):
    """Sum of each channel of a tile."""
    if t.shape[1] == 1:
        # All in one: with one axis after the other, threads would have to meet twice as often.
        sums = tl.zeros([1], t.dtype) + tl.sum(t)
    else:
        sums = tl.sum(tl.sum(t, axis=2), axis=0)
    return sums


@triton.jit
def moments_of_tiles(
    x_ptr,
    mask_ptr,
    c,
    first,
    last,
    N,
    C,
    S,
    tiles_s,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    INDEX: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Count, mean and sum of squared deviations over some tiles of a block of channels.

    Each tile is read once and held while its mean, and then the squares around that mean,
    are summed; tiles merge by Chan's law. No E[x²] − E[x]², which has no digits left where
    |mean| ≫ deviation.

    Source: Chan, Golub & LeVeque (1983).
    """
    count = tl.zeros([BLOCK_C], COMPUTE)
    mean = tl.zeros([BLOCK_C], COMPUTE)
    squares = tl.zeros([BLOCK_C], COMPUTE)
    for tile in range(first, last):
        offsets, inside, samples = locate(tile, c, mask_ptr, N, C, S, tiles_s, BLOCK_N, BLOCK_S, INDEX)
        x = tl.load(x_ptr + offsets, mask=inside & samples, other=0.0).to(COMPUTE)
        if mask_ptr is None:
            rows = tl.minimum(N - (tile // tiles_s) * BLOCK_N, BLOCK_N)
            tile_count = tl.cast(rows * tl.minimum(S - (tile % tiles_s) * BLOCK_S, BLOCK_S), COMPUTE)
        else:
            tile_count = total(samples.to(COMPUTE))
        divisor = tl.maximum(tile_count, 1.0)
        tile_mean = total(x) / divisor
        deviation = tl.where(samples, x - spread(tile_mean), 0.0)
        # The mean of what is left is the rounding of the mean.
        correction = total(deviation) / divisor
        deviation = tl.where(samples, deviation - spread(correction), 0.0)
        tile_squares = total(deviation * deviation)
        tile_mean += correction

        gap = tile_mean - mean
        share = tile_count / tl.maximum(count + tile_count, 1.0)
        squares += tile_squares + gap * gap * count * share
        mean += gap * share
        count += tile_count
    return count, mean, squares
