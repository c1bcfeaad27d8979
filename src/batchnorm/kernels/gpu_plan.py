"""How a tensor is cut for the GPU: tiles, blocks of channels, and splits of a channel's samples.

Every layout is one formula: memory is (N, C, S) with S innermost. Contiguous tensors have
S locations a plane; channels-last tensors and rows of features have S = 1 and a sample in
each of N rows. A tile is ``block_n × block_c × block_s`` of it.
"""

from dataclasses import dataclass

TILE = 4096
"""Values in a tile: 16 for each of the 256 threads that share it."""
RUN = 64
"""Neighbours in memory that a tile should at least reach over: 128 bytes of 16-bit values."""
LONGEST_RUN = 1024
MAX_SPLITS = 512
"""More would make merging them a share of the whole."""
WHOLE_TILES = 8
"""Up to so many tiles, one program reads a block of channels twice: the second time from cache."""
PROGRAMS_PER_PROCESSOR = 16
"""Two to five run at a time; with several rounds of them, the last one leaves little idle."""
INT32_VALUES = 2**31
"""From so many values on, offsets do not fit into 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cut of an (N, C, S) tensor.

    Attributes:
        block_n, block_c, block_s: Sides of a tile, powers of two.
        align: Largest power of two, at most 16, that divides S.
        tiles_s: Tiles along S.
        num_tiles: Tiles that hold a block of channels.
        num_blocks: Blocks of channels.
        tiles_per_split: Tiles that one program of a reduction goes through.
        num_splits: Programs of a reduction for each block of channels; 1 where one program
            does everything for its channels.
        wide: Whether offsets need 64 bits.
    """

    block_n: int
    block_c: int
    block_s: int
    align: int
    tiles_s: int
    num_tiles: int
    num_blocks: int
    tiles_per_split: int
    num_splits: int
    wide: bool


def plan(num_n: int, num_c: int, num_s: int, num_processors: int) -> Plan:
    """Cut an (N, C, S) tensor for a chip of ``num_processors`` multiprocessors.

    The cut depends on the shape and the chip alone, so results repeat bit for bit.
    """
    block_s = _run(num_s)
    block_c = min(_power_of_two(num_c), max(1, RUN // block_s))
    block_n = min(_power_of_two(num_n), max(1, TILE // (block_s * block_c)))
    tiles_s = _ceil(num_s, block_s)
    num_tiles = _ceil(num_n, block_n) * tiles_s
    num_blocks = _ceil(num_c, block_c)
    tiles_per_split = num_tiles
    if num_tiles > WHOLE_TILES:
        wanted = _ceil(num_processors * PROGRAMS_PER_PROCESSOR, num_blocks)
        tiles_per_split = _ceil(num_tiles, min(wanted, MAX_SPLITS))
    return Plan(
        block_n=block_n,
        block_c=block_c,
        block_s=block_s,
        align=min(16, num_s & -num_s),
        tiles_s=tiles_s,
        num_tiles=num_tiles,
        num_blocks=num_blocks,
        tiles_per_split=tiles_per_split,
        num_splits=_ceil(num_tiles, tiles_per_split),
        wide=num_n * num_c * num_s >= INT32_VALUES,
    )


def _run(num_s: int) -> int:
    # 56 × 56 fills 13 runs of 256 but not 4 of 1024; among equals the longer run has fewer steps.
    if num_s <= LONGEST_RUN // 4:
        return _power_of_two(num_s)
    runs = (LONGEST_RUN // 4, LONGEST_RUN // 2, LONGEST_RUN)
    return min(runs, key=lambda run: (_ceil(num_s, run) * run, -run))


def _ceil(whole: int, part: int) -> int:
    return -(-whole // part)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()
