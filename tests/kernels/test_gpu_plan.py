"""The cut of a tensor for the GPU covers it, fits registers, and fills the chip."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.kernels import gpu_plan
from batchnorm.kernels.gpu_plan import plan

sizes = st.one_of(st.integers(1, 70), st.integers(1, 10**6))


@given(num_n=sizes, num_c=sizes, num_s=sizes, num_processors=st.integers(1, 200))
@settings(max_examples=300, deadline=None)
def test_every_value_lies_in_a_tile_of_one_program(num_n, num_c, num_s, num_processors):
    cut = plan(num_n, num_c, num_s, num_processors)
    tiles_n = cut.num_tiles // cut.tiles_s
    assert (tiles_n - 1) * cut.block_n < num_n <= tiles_n * cut.block_n
    assert (cut.tiles_s - 1) * cut.block_s < num_s <= cut.tiles_s * cut.block_s
    assert (cut.num_blocks - 1) * cut.block_c < num_c <= cut.num_blocks * cut.block_c
    assert (cut.num_splits - 1) * cut.tiles_per_split < cut.num_tiles <= cut.num_splits * cut.tiles_per_split
    assert cut.num_splits <= gpu_plan.MAX_SPLITS
    assert cut.block_n * cut.block_c * cut.block_s <= gpu_plan.TILE
    for side in (cut.block_n, cut.block_c, cut.block_s, cut.align):
        assert side & (side - 1) == 0, f"{side} is not a power of two"
    assert num_s % cut.align == 0
    assert cut.wide == (num_n * num_c * num_s >= 2**31)


@pytest.mark.parametrize(
    "shape",
    [(32, 64, 112 * 112), (32, 256, 56 * 56), (128, 3, 224 * 224), (32 * 112 * 112, 64, 1), (100_000, 8, 1)],
    ids=str,
)
def test_a_large_tensor_fills_the_chip_whatever_its_channels(shape):
    cut = plan(*shape, num_processors=132)
    assert cut.num_splits * cut.num_blocks >= 132 * min(3, cut.num_tiles * cut.num_blocks // 132)
    assert cut.num_splits > 1


@pytest.mark.parametrize("shape", [(32, 2048, 49), (32, 512, 196), (2, 3, 5), (64, 100, 1)], ids=str)
def test_short_channels_take_one_program_each(shape):
    assert plan(*shape, num_processors=132).num_splits == 1


@pytest.mark.parametrize("num_s", [49, 196, 784, 3136, 12544])
def test_few_threads_idle_over_the_ends_of_the_planes_of_a_resnet(num_s):
    cut = plan(32, 64, num_s, 132)
    assert cut.tiles_s * cut.block_s <= 1.31 * num_s
