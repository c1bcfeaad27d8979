"""Paired differences and Student's t."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.paired import Paired, student_t

# From tables of the t distribution (two-sided).
TABLE = [
    (1, 0.95, 12.706),
    (2, 0.95, 4.303),
    (3, 0.95, 3.182),
    (4, 0.95, 2.776),
    (5, 0.99, 4.032),
    (9, 0.9, 1.833),
    (10, 0.999, 4.587),
    (30, 0.95, 2.042),
    (120, 0.99, 2.617),
]


@pytest.mark.parametrize(("degrees", "confidence", "expected"), TABLE)
def test_t_is_that_of_tables(degrees, confidence, expected):
    assert student_t(degrees, confidence) == pytest.approx(expected, abs=5.1e-4)


@given(st.integers(1, 60), st.floats(0.01, 0.999))
def test_t_grows_with_confidence_and_falls_with_degrees(degrees, confidence):
    t = student_t(degrees, confidence)
    assert student_t(degrees, (1 + confidence) / 2) > t
    assert student_t(degrees + 1, confidence) < t
    # One and two degrees have closed forms.
    assert student_t(1, confidence) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-9)
    two = confidence * math.sqrt(2 / (1 - confidence**2))
    assert student_t(2, confidence) == pytest.approx(two, rel=1e-9)


def test_an_interval_by_hand():
    paired = Paired.of([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
    assert paired.values == (1.0, 2.0, 3.0)
    assert (paired.mean, paired.std) == (2.0, 1.0)
    assert paired.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not paired.is_told_apart
    assert Paired(paired.values, 0.9).half_width == pytest.approx(2.919986 / math.sqrt(3), rel=1e-6)
    assert Paired(paired.values, 0.9).is_told_apart
    assert Paired((-1.0, -2.0, -3.0), 0.9).is_told_apart


def test_one_pair_tells_nothing_and_equal_differences_everything():
    assert Paired((5.0,)).half_width == math.inf
    assert not Paired((5.0,)).is_told_apart
    assert Paired((5.0,)).pairs_needed() is None
    assert Paired((0.5, 0.5)).is_told_apart
    assert not Paired((0.0, 0.0)).is_told_apart


def test_pairs_needed_tell_the_mean_apart_and_fewer_do_not():
    paired = Paired((0.0, 1.0, 2.0))
    needed = paired.pairs_needed()
    assert student_t(needed - 1, 0.95) / math.sqrt(needed) < 1.0
    assert student_t(needed - 2, 0.95) / math.sqrt(needed - 1) >= 1.0
    assert needed == 7
    many = Paired((-1.0, 1.2))
    assert student_t(many.pairs_needed() - 1, 0.95) * many.std < 0.1 * math.sqrt(many.pairs_needed())
    assert student_t(many.pairs_needed() - 2, 0.95) * many.std >= 0.1 * math.sqrt(many.pairs_needed() - 1)
    assert Paired((-1.0, 1.0 + 1e-9)).pairs_needed() is None
    assert Paired((0.0, 0.0)).pairs_needed() is None
    assert Paired((1.0, 1.0)).pairs_needed() == 2


@given(st.lists(st.floats(-1, 3), min_size=2, max_size=6), st.sampled_from([0.9, 0.95, 0.99]))
def test_pairs_needed_are_the_fewest(values, confidence):
    paired = Paired(tuple(values), confidence)
    needed = paired.pairs_needed(500)

    def tells(pairs):
        return student_t(pairs - 1, confidence) * paired.std < abs(paired.mean) * math.sqrt(pairs)

    if needed is None:
        assert not tells(499)
    else:
        assert tells(needed)
        assert needed == 2 or not tells(needed - 1)


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0, 2.0]), ([], [])], ids=["uneven", "nothing"])
def test_what_is_not_paired_is_refused(first, second):
    with pytest.raises(ValueError, match=f"got {len(first)} and {len(second)}"):
        Paired.of(first, second)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_a_confidence_lies_between_0_and_1(confidence):
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        student_t(3, confidence)
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        Paired.of([1.0], [2.0], confidence)


def test_degrees_are_at_least_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        student_t(0, 0.95)
