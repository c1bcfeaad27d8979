import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.moments import Moments


def truth(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.double().movedim(1, 0).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=False)


@given(
    cuts=st.lists(st.integers(0, 60), max_size=8),
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e4, 1e6]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_any_split_merged_in_any_order_gives_the_moments_of_the_whole(cuts, offset, order):
    x = torch.randn(60, 3, 2, dtype=torch.float64) + offset
    edges = [0, *sorted(cuts), 60]
    parts = [Moments.of(x[a:b]) for a, b in itertools.pairwise(edges)]  # some are empty
    order.shuffle(parts)
    whole = Moments.merged(parts)
    mean, var = truth(x - offset)  # exact: the offset is subtracted without rounding
    assert whole.count == 120
    torch.testing.assert_close(whole.mean, mean + offset, rtol=1e-15, atol=1e-15)
    # Each merge knows the distance of two means to a rounding of the offset.
    torch.testing.assert_close(whole.var, var, rtol=1e-13 + 1e-15 * abs(offset), atol=0)


def as_a_tree(parts: list[Moments], order) -> Moments:
    """Any two neighbours or strangers at a time, until one is left."""
    parts = list(parts)
    while len(parts) > 1:
        one = parts.pop(order.randrange(len(parts)))
        other = parts.pop(order.randrange(len(parts)))
        parts.insert(order.randrange(len(parts) + 1), one.merge(other))
    return parts[0]


STREAMS = {
    "offset": st.sampled_from([0.0, 1.0, -30.0, 1e4, 1e6]),
    "sizes": st.lists(st.one_of(st.just(1), st.integers(1, 40)), min_size=1, max_size=25),
    "seed": st.integers(0, 1000),
    "order": st.randoms(use_true_random=False),
}


def stream(sizes: list[int], offset: float, seed: int) -> list[torch.Tensor]:
    """Float32 batches of those sizes whose means differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    drift = torch.linspace(-1, 1, len(x), dtype=torch.float64)[:, None]
    return list((x + drift + offset).float().split(sizes))


@given(**STREAMS)
@settings(max_examples=60, deadline=None)
def test_any_tree_of_merges_of_float32_samples_gives_float64_moments_of_the_whole(sizes, offset, seed, order):
    batches = stream(sizes, offset, seed)
    whole = torch.cat(batches).double()
    merged = as_a_tree([Moments.of(b, dtype=torch.float64) for b in batches], order)
    assert merged.count == len(whole)
    rounding = 2**-24  # of float32, in which running statistics are stored
    torch.testing.assert_close(merged.mean, whole.mean(0), rtol=rounding, atol=rounding)
    torch.testing.assert_close(merged.var, whole.var(0, correction=0), rtol=rounding, atol=1e-12)


@given(**STREAMS)
@settings(max_examples=60, deadline=None)
def test_any_tree_of_merges_in_float32_is_off_by_its_rounding_of_the_mean(sizes, offset, seed, order):
    batches = stream(sizes, offset, seed)
    whole = torch.cat(batches).double()
    merged = as_a_tree([Moments.of(b) for b in batches], order)
    assert merged.mean.dtype == torch.float32
    mean, var = whole.mean(0), whole.var(0, correction=0)
    # A merge rounds the mean, on the way in and out, and the variance knows a distance of means to that.
    rounding = 2**-24 * (abs(offset) + 4)
    depth = len(batches) + 1
    assert ((merged.mean.double() - mean).abs() <= 2 * depth * rounding).all()
    allowed = 2 * depth * (2 * rounding * (var.sqrt() + 1) + rounding**2 + 2**-23 * var)
    assert ((merged.var.double() - var).abs() <= allowed).all()


def test_unequal_splits_weigh_by_count_not_by_batch():
    # Averaging batches of 64 and 2 equally gave 0.66 where the population has 296.7.
    x = torch.cat([torch.randn(64, 1), 100 + torch.randn(2, 1)])
    merged = Moments.of(x[:64]).merge(Moments.of(x[64:]))
    torch.testing.assert_close(merged.unbiased(), x.var(0), rtol=1e-5, atol=0)
    assert merged.unbiased().item() > 290


def test_variance_survives_a_mean_far_from_zero_in_float32():
    # E[x²] − E[x]² gives 0 or worse here.
    x = (1e4 + torch.randn(64, 4, 8, dtype=torch.float64)).float()
    moments = Moments.of(x)
    mean, var = truth(x)
    torch.testing.assert_close(moments.var.double(), var, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_moments_are_float32_or_wider(dtype):
    moments = Moments.of(torch.randn(4, 3, dtype=torch.float64).to(dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert moments.mean.dtype == moments.var.dtype == expected


def test_features_last_and_mask_agree_with_picking_by_hand():
    x = torch.randn(4, 5, 3)
    mask = torch.rand(4, 5) > 0.4
    moments = Moments.of(x, channel_dim=-1, mask=mask)
    picked = x[mask]
    assert moments.count.item() == len(picked)
    torch.testing.assert_close(moments.mean, picked.mean(0))
    torch.testing.assert_close(moments.var, picked.var(0, unbiased=False))


def test_masked_samples_may_hold_anything():
    x = torch.randn(4, 3)
    x[0] = torch.nan
    moments = Moments.of(x, mask=torch.tensor([False, True, True, True]))
    torch.testing.assert_close(moments.mean, x[1:].mean(0))
    torch.testing.assert_close(moments.var, x[1:].var(0, unbiased=False))


def test_nothing_has_count_zero_and_changes_no_merge():
    nothing = Moments.of(torch.empty(0, 3))
    some = Moments.of(torch.randn(5, 3))
    for merged in (nothing.merge(some), some.merge(nothing)):
        assert merged.count == 5
        torch.testing.assert_close(merged.mean, some.mean, rtol=0, atol=0)
        torch.testing.assert_close(merged.var, some.var, rtol=0, atol=0)
    masked = Moments.of(torch.randn(5, 3), mask=torch.zeros(5, dtype=torch.bool))
    assert masked.count.item() == 0
    torch.testing.assert_close(masked.merge(some).mean, some.mean)


def test_unbiased_of_one_sample_is_not_a_division_by_zero():
    assert Moments.of(torch.ones(1, 2)).unbiased().tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(4, 3, dtype=torch.bool), r"\(4, 5\).*got \(4, 3\)"),
        (torch.ones(4, 5), "must be boolean.*torch.float32"),
    ],
    ids=["wrong shape", "not boolean"],
)
def test_a_mask_that_does_not_fit_is_refused(mask, says):
    with pytest.raises(ValueError, match=says):
        Moments.of(torch.randn(4, 3, 5), mask=mask)


def test_merging_no_parts_is_refused():
    with pytest.raises(ValueError, match="at least one part"):
        Moments.merged([])


def test_counts_of_masks_do_not_make_float32_of_float64_moments():
    x = torch.randn(90, 2, dtype=torch.float64)
    shown = torch.rand(90) > 0.4
    parts = [Moments.of(x[i : i + 30], mask=shown[i : i + 30]) for i in (0, 30, 60)]
    merged = Moments.merged(parts)
    torch.testing.assert_close(merged.unbiased(), x[shown].var(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.mean, x[shown].mean(0), rtol=1e-14, atol=1e-15)


def test_pooling_many_sets_at_once_is_merging_them_one_by_one():
    sizes = [5, 0, 1, 30]
    parts = [Moments.of(part) for part in (torch.randn(36, 3).double() * 2 + 1e3).split(sizes)]
    means, variances = (torch.stack([getattr(p, name) for p in parts]) for name in ("mean", "var"))
    weights = torch.tensor(sizes).double()
    got, expected = Moments.pooled(means, variances, weights), Moments.merged(parts)
    torch.testing.assert_close(got.mean, expected.mean, rtol=1e-14, atol=0)
    torch.testing.assert_close(got.var, expected.var, rtol=1e-12, atol=0)
    assert got.count == 36
    # Of shares only the ratio matters; and nothing at all pools to nothing.
    again = Moments.pooled(means, variances, weights / 36)
    torch.testing.assert_close(again.var, got.var, rtol=1e-12, atol=0)
    nothing = Moments.pooled(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    assert torch.equal(nothing.mean, torch.zeros(3))
    assert nothing.count == 0
