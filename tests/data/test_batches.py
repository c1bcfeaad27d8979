import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.data import batch_indices, epoch_order, to_input


@settings(deadline=None, max_examples=40)
@given(
    num_examples=st.integers(1, 50), batch_size=st.integers(1, 50), seed=st.integers(0, 2**31), data=st.data()
)
def test_an_epoch_is_full_batches_of_distinct_examples(num_examples, batch_size, seed, data):
    batch_size = min(batch_size, num_examples)
    num_batches = num_examples // batch_size
    epoch = data.draw(st.integers(0, 3))
    steps = range(epoch * num_batches, (epoch + 1) * num_batches)
    seen = torch.cat([batch_indices(step, batch_size, num_examples, seed) for step in steps])
    assert seen.dtype == torch.int64
    assert seen.tolist() == epoch_order(epoch, num_examples, seed)[: num_batches * batch_size].tolist()
    assert len(set(seen.tolist())) == num_batches * batch_size
    assert set(seen.tolist()) <= set(range(num_examples))


def test_remainder_is_dropped_and_differs_between_epochs():
    dropped = [
        set(range(10)) - {int(i) for s in (0, 1, 2) for i in batch_indices(3 * e + s, 3, 10, 5)}
        for e in range(60)
    ]
    assert all(len(rest) == 1 for rest in dropped)
    assert set.union(*dropped) == set(range(10))


def test_orders_depend_on_seed_and_epoch_but_not_on_history():
    pairs = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = {pair: epoch_order(pair[1], 100, pair[0]).tolist() for pair in pairs}
    # (1, 0) and (0, 1) differ too: seed and epoch are mixed, not added.
    assert len({tuple(order) for order in orders.values()}) == len(pairs)
    torch.manual_seed(7)
    assert {pair: epoch_order(pair[1], 100, pair[0]).tolist() for pair in reversed(pairs)} == orders


def test_global_generator_is_left_alone_and_results_are_the_callers_own():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = batch_indices(3, 4, 20, 99)
    kept = first.clone()
    first.zero_()
    epoch_order(0, 20, 99).zero_()
    assert torch.equal(batch_indices(3, 4, 20, 99), kept)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("step", "batch_size", "says"),
    [
        pytest.param(0, 11, "between 1 and the 10", id="batch larger than the set"),
        pytest.param(0, 0, "between 1 and the 10", id="empty batch"),
        pytest.param(-1, 5, "counted from 0", id="step before the first"),
    ],
)
def test_impossible_batches(step, batch_size, says):
    with pytest.raises(ValueError, match=says):
        batch_indices(step, batch_size, 10, 0)


def test_levels_become_numbers():
    levels = torch.tensor([0, 1, 127, 128, 255], dtype=torch.uint8)
    assert to_input(levels).tolist() == pytest.approx([0, 1 / 255, 127 / 255, 128 / 255, 1])
    assert to_input(levels, binarize=True).tolist() == [0, 0, 0, 1, 1]
    assert to_input(levels, binarize=True).dtype == to_input(levels).dtype == torch.float32


def test_other_dtypes_have_unknown_levels():
    with pytest.raises(TypeError, match=r"uint8 .* got torch\.float32"):
        to_input(torch.rand(3))
