"""Standard errors from the spread of batches: the law that merges them, and whether they are true."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.statistics.spread import Spread


def float64_moments(batch: Tensor) -> Moments:
    return Moments.of(batch, dtype=torch.float64)


def by_definition(batches: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Cluster-sampling errors, written out: residuals of batch totals from the pooled moments."""
    whole = torch.cat(batches).double()
    mean, var = whole.mean(0), whole.var(0, correction=0)
    num, count = len(batches), len(whole)
    of_mean = sum((b.double() - mean).sum(0).square() for b in batches)
    of_var = sum(((b.double() - mean).square() - var).sum(0).square() for b in batches)
    se_mean, se_var = ((s * num / (num - 1)).sqrt() / count for s in (of_mean, of_var))
    return se_mean / (var + eps).sqrt(), se_var / (2 * (var + eps))


def merged(parts: list[Spread]) -> Spread:
    """As a tree, not from left to right."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return merged(parts[:half]).merge(merged(parts[half:]))


@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=12),
    offset=st.sampled_from([0.0, -30.0, 1e4, 1e6]),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_any_tree_of_merges_gives_the_errors_by_definition(sizes, offset, order, seed):
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(len(sizes), 3, generator=generator, dtype=torch.float64) * 2  # batches differ
    batches = [
        torch.randn(n, 3, generator=generator, dtype=torch.float64) + kind + offset
        for n, kind in zip(sizes, kinds, strict=True)
    ]
    parts = [Spread.of([float64_moments(b)]) for b in [*batches, batches[0][:0]]]  # one has no samples
    order.shuffle(parts)
    spread = merged(parts)
    assert spread.num == len(sizes)
    got = spread.standard_errors(float64_moments(torch.cat(batches)), 1e-5)
    for one, expected in zip(got, by_definition(batches, 1e-5), strict=True):
        # Roots of what rounding leaves of squares: an error is known to about 1e-8 of a deviation.
        torch.testing.assert_close(one, expected, rtol=1e-7, atol=1e-7)


def test_batches_of_a_constant_channel_leave_no_error():
    parts = [Spread.of([float64_moments(torch.full((n, 1), 1e4))]) for n in (5, 2, 9)]
    for error in merged(parts).standard_errors(float64_moments(torch.full((16, 1), 1e4)), 0.0):
        assert error.item() == 0


def test_one_batch_tells_nothing_of_the_error():
    x = torch.randn(9, 2)
    for error in Spread.of([float64_moments(x)]).standard_errors(float64_moments(x), 1e-5):
        assert error.tolist() == [torch.inf, torch.inf]


@pytest.mark.parametrize("per_batch", [1, 4], ids=["batches of one", "batches of four"])
def test_errors_are_true_where_locations_within_an_image_are_correlated(per_batch):
    """The errors that were estimated are those that are made, over many repetitions."""
    torch.manual_seed(0)
    num_repeats, num_images, pixels = 400, 64, 36
    # An image is one brightness with a little noise: 36 pixels tell hardly more than one.
    images = torch.randn(num_repeats, num_images, 1, 1, dtype=torch.float64)
    images = images + 0.1 * torch.randn(num_repeats, num_images, 1, pixels, dtype=torch.float64)
    means, deviations, told = [], [], []
    for drawn in images:
        parts = [float64_moments(b) for b in drawn.split(per_batch)]
        pooled = Moments.merged(parts)
        told.append([e.item() for e in Spread.of(parts).standard_errors(pooled, 0.0)])
        means.append(pooled.mean.item())
        deviations.append(pooled.var.sqrt().item())
    made = [torch.tensor(v).std().item() / 1.01**0.5 for v in (means, deviations)]
    typical = torch.tensor(told).square().mean(0).sqrt()
    assert typical[0].item() == pytest.approx(made[0], rel=0.12)
    assert typical[1].item() == pytest.approx(made[1], rel=0.12)
    by_pixels = 1 / (num_images * pixels) ** 0.5  # what a count of pixels would promise
    assert made[0] > 5 * by_pixels
