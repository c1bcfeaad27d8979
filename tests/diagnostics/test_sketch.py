"""The sketch: its bound holds on every stream, and says exactly which samples it is about."""

import itertools
import math

import numpy as np
import pytest

from batchnorm.diagnostics import Sketch
from batchnorm.diagnostics.sketch import sampling_error
from batchnorm.diagnostics.summary import _spread

LEVELS = (0, 1, 5, 15, 50, 85, 95, 99, 100)
NUM = 20_000


def special() -> np.ndarray:
    x = np.random.default_rng(0).standard_normal(NUM)
    x[::7], x[1::7], x[2::11] = np.inf, -np.inf, np.nan
    return x


STREAMS = {
    "ascending": lambda: np.arange(NUM, dtype=float),
    "descending": lambda: -np.arange(NUM, dtype=float),
    "constant": lambda: np.full(NUM, 3.0),
    "two values": lambda: np.arange(NUM) % 2.0,
    "outside in": lambda: np.arange(NUM) * (-1.0) ** np.arange(NUM),
    "heavy-tailed": lambda: np.random.default_rng(0).standard_cauchy(NUM),
    "a late jump": lambda: np.where(np.arange(NUM) < NUM * 0.9, 0, np.arange(NUM, dtype=float)),
    "infinite and nan": special,
}


def fed(stream: np.ndarray, *, rows: int = 100, size: int = 64, seed: int = 0) -> Sketch:
    """A sketch of two units: the stream, and its values with the sign changed."""
    sketch = Sketch(2, size=size, seed=seed)
    for start in range(0, len(stream), rows):
        part = stream[start : start + rows]
        sketch.update(np.stack([part, -part], 1))
    return sketch


def miss(values: np.ndarray, answer: float, level: float) -> int:
    """By how many ranks a percentile is off, 0 where the value asked for is given."""
    values = values[~np.isnan(values)]
    wanted = math.ceil(level * len(values) / 100)
    below, up_to = int((values < answer).sum()), int((values <= answer).sum())
    return max(0, below + 1 - max(wanted, 1), wanted - up_to)


def misses(sketch: Sketch, stream: np.ndarray) -> np.ndarray:
    found = sketch.percentiles(LEVELS)
    return np.array(
        [
            [miss(unit, found[i, u], level) for i, level in enumerate(LEVELS)]
            for u, unit in enumerate((stream, -stream))
        ]
    )


@pytest.mark.parametrize("rows", [1, 33, 5000], ids="{} a call".format)
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_no_percentile_is_off_by_more_than_the_bound(stream, rows):
    x = stream()
    sketch = fed(x, rows=rows)
    off = misses(sketch, x)
    assert sketch.count == NUM
    assert 0 < sketch.rank_error() <= sketch.rank_error(None)
    assert off.max() <= sketch.rank_error() * NUM
    assert off[:, [0, -1]].max() == 0  # extremes are exact
    assert sketch.num_nan.tolist() == [np.isnan(x).sum()] * 2


def test_the_bound_with_confidence_holds_as_often_as_it_says_and_is_not_idle():
    x = np.random.default_rng(3).permutation(4000).astype(float)
    found = [fed(x, seed=seed) for seed in range(300)]
    off = np.array([misses(sketch, x)[0].max() for sketch in found])
    for confidence in (0.5, 0.9, 0.99):
        # The worst of nine percentiles, though the bound is for one.
        assert (off > found[0].rank_error(confidence) * len(x)).mean() <= 1 - confidence
    # Not so wide that it would hide a sketch that is twice as bad.
    assert off.max() > found[0].rank_error(0.99) * len(x) / 3


def test_the_bound_is_that_of_the_halvings_that_happened_to_both_streams(monkeypatch):
    heights, halve = [], Sketch._halve

    def noted(sketch: Sketch, h: int) -> None:
        heights.append(h)
        halve(sketch, h)

    monkeypatch.setattr(Sketch, "_halve", noted)
    x = np.random.default_rng(0).permutation(NUM).astype(float)
    whole = fed(x[:9000]).merge(fed(x[9000:], seed=1))
    weights = 2.0 ** np.array(heights)
    assert weights.max() > 100
    assert whole.rank_error(None) == pytest.approx(weights.sum() / NUM)
    for delta in (0.01, 0.5):  # Azuma and Hoeffding, differences between -w and w
        bound = math.sqrt(2 * math.log(2 / delta) * np.square(weights).sum())
        assert bound < weights.sum()
        assert whole.rank_error(1 - delta) == pytest.approx(bound / NUM)


def test_a_bound_without_chance_holds_for_the_worst_of_coins(monkeypatch):
    """With every coin falling the same way, errors add up to more than chance would let them."""
    x = np.random.default_rng(0).permutation(NUM).astype(float)
    sketch = Sketch(1, size=64)
    monkeypatch.setattr(sketch, "_coins", type("Tails", (), {"integers": lambda self, n: 0})())
    for part in x.reshape(-1, 1, 1):
        sketch.update(part)
    off = max(miss(x, v, p) for p, v in zip(LEVELS, sketch.percentiles(LEVELS)[:, 0], strict=True))
    assert sketch.rank_error(0.99) * NUM < off <= sketch.rank_error(None) * NUM


def test_what_is_held_whole_is_exact():
    x = np.random.default_rng(0).standard_normal((64, 3))
    sketch = Sketch(3, size=64)
    sketch.update(x[:40])
    sketch.update(x[40:])
    assert sketch.rank_error(None) == 0
    np.testing.assert_array_equal(
        sketch.percentiles(LEVELS), np.percentile(x, LEVELS, axis=0, method="inverted_cdf")
    )
    np.testing.assert_array_equal(sketch.pooled(LEVELS), np.percentile(x, LEVELS, method="inverted_cdf"))


def test_nans_take_no_ranks():
    x = np.random.default_rng(0).standard_normal((60, 2))
    x[::2, 0] = np.nan
    sketch = Sketch(2, size=64)
    sketch.update(x)
    for u, found in enumerate(sketch.percentiles(LEVELS).T):
        numbers = x[~np.isnan(x[:, u]), u]
        np.testing.assert_array_equal(found, np.percentile(numbers, LEVELS, method="inverted_cdf"))
    numbers = x[~np.isnan(x)]
    np.testing.assert_array_equal(
        sketch.pooled(LEVELS), np.percentile(numbers, LEVELS, method="inverted_cdf")
    )


def test_pooled_percentiles_have_the_bound_of_one_unit():
    x = np.random.default_rng(1).standard_normal((5000, 8)) * np.arange(1, 9)
    x[::3, 2] = np.nan
    sketch = Sketch(8, size=64)
    for part in x.reshape(50, 100, 8):
        sketch.update(part)
    off = [miss(x.ravel(), v, p) for p, v in zip(LEVELS, sketch.pooled(LEVELS), strict=True)]
    assert 0 < max(off) <= sketch.rank_error() * x.size


@pytest.mark.parametrize("num_parts", [2, 3, 7])
def test_merging_in_any_shape_keeps_the_bound(num_parts):
    x = np.sort(np.random.default_rng(num_parts).standard_cauchy(NUM))
    cuts = [0, *np.sort(np.random.default_rng(2).integers(0, NUM, num_parts - 1)), NUM]
    parts = [fed(x[a:b], rows=77, seed=i) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
    before = [part.percentiles(LEVELS) for part in parts]
    left = parts[0]
    for part in parts[1:]:
        left = left.merge(part)
    tree = parts
    while len(tree) > 1:
        tree = [a.merge(b) for a, b in zip(tree[::2], tree[1::2], strict=False)] + tree[len(tree) & ~1 :]
    for whole in (left, tree[0]):
        assert whole.count == NUM
        assert whole.seeds == set(range(num_parts))
        assert misses(whole, x).max() <= whole.rank_error() * NUM
        assert whole._held()[1].sum() == NUM
    for part, as_it_was in zip(parts, before, strict=True):  # merging leaves the parts alone
        np.testing.assert_array_equal(part.percentiles(LEVELS), as_it_was)


def test_memory_is_bounded_and_every_sample_is_accounted_for():
    sketch = Sketch(2, size=64)
    for _ in range(2000):
        sketch.update(np.random.default_rng(0).standard_normal((500, 2)))
        held, weights = sketch._held()
        assert held.shape[1] <= 64
        assert sum(level.base is None for level in sketch._levels) == len(sketch._levels)  # no view of more
    assert weights.sum() == sketch.count == 1_000_000
    assert len(sketch._levels) < 20


def test_the_same_calls_give_the_same_bits_and_other_seeds_others():
    x = np.random.default_rng(0).standard_normal(NUM)
    np.testing.assert_array_equal(fed(x).percentiles(LEVELS), fed(x).percentiles(LEVELS))
    assert (fed(x).percentiles(LEVELS) != fed(x, seed=1).percentiles(LEVELS)).any()


def test_a_million_samples_at_the_size_that_the_recorder_has():
    sketch = Sketch(1)
    for _ in range(1000):
        sketch.update(np.zeros((1024, 1), dtype=np.float32))
    assert sketch.rank_error() < 0.01  # what the docs promise


def test_units_without_numbers():
    empty = Sketch(2)
    assert np.isnan(empty.percentiles((0, 50, 100))).all()
    assert np.isnan(empty.pooled((50,))).all()
    assert empty.rank_error() == 0
    empty.update(np.empty((0, 2)))
    empty.update(np.array([[np.nan, 1.0], [np.nan, np.inf]]))
    found = empty.percentiles((0, 50, 100))
    np.testing.assert_array_equal(found, [[np.nan, 1], [np.nan, 1], [np.nan, np.inf]])
    assert Sketch(0).percentiles((50,)).shape == (1, 0)


ERRORS = {
    "units": (lambda: Sketch(2).update(np.zeros((3, 4))), r"takes \(S, 2\), got \(3, 4\)"),
    "size": (lambda: Sketch(2, size=10), "size of 64 or more, got 2 and 10"),
    "confidence": (lambda: fed(np.arange(999.0)).rank_error(1.0), "between 0 and 1, got 1.0"),
    "other units": (lambda: Sketch(2).merge(Sketch(3, seed=1)), "got 2 units of 768 samples and 3 of 768"),
    "other size": (lambda: Sketch(2).merge(Sketch(2, size=64, seed=1)), "2 of 64"),
    "same coins": (lambda: Sketch(2).merge(Sketch(2)), "tossed the coins of seed 0"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


PATTERNS = {
    "columns of an image": lambda n: np.arange(n) % 64,
    "ascending": lambda n: np.arange(n),
    "a few large": lambda n: (np.arange(n) < n // 50) * 1.0,
    "period of the stride": lambda n: np.arange(n) % (n // 200) * 1.0,
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_percentiles_of_a_sample_are_off_by_no_more_than_the_bound(pattern):
    """Whatever order the places have: a fixed stride is fooled by the last of these."""
    x = pattern(20_000)
    bound = sampling_error(200, len(x))
    assert bound == pytest.approx(math.sqrt(math.log(200) / 400))
    off = 0.0
    for seed in range(40):
        chosen = np.sort(x[_spread(len(x), 200, seed)])
        assert len(chosen) == 200
        for level in (1, 15, 50, 85, 99):
            off = max(off, miss(x, chosen[math.ceil(level * 2) - 1], level) / len(x))
    assert off <= bound + 1 / 200


def test_sampling_error_of_everything_is_none():
    assert sampling_error(50, 50) == 0
    assert sampling_error(0, 50) == 1
    assert sampling_error(2, 50) == 1  # never more than all ranks
    assert _spread(7, 7, 0).tolist() == list(range(7))
    assert np.diff(_spread(10_001, 300, 0)).min() >= 0
