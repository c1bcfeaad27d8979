"""Recalibration against the one truth, for any split of the data; pooled and paper beside it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from population import DATA, assert_statistics, assert_unchanged, deep, images, norms, snapshot, truth
from torch import nn

from batchnorm.statistics import recalibrate

SPLITS = {
    "one batch": [DATA],
    "ones": [1] * DATA,
    "last of one": [13, 13, 13, 1],
    "64 + 2 in small": [38, 2],
    "an empty batch between": [20, 0, 20],
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_exact_equals_the_whole_data_as_one_batch(sizes):
    model, x = deep(), images()
    expected = truth(model, x)
    report = recalibrate(model, x.split(sizes))
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)
    assert report.converged
    assert report.residual <= 1e-12
    assert report.num_passes == len(expected) + 1
    assert report.num_batches == len(sizes)


@settings(deadline=None, max_examples=15)
@given(cuts=st.sets(st.integers(1, DATA - 1), max_size=12))
def test_any_split_gives_the_same_statistics_in_float32(cuts):
    edges = [0, *sorted(cuts), DATA]
    x = images(dtype=torch.float32)
    model = deep(torch.float32)
    expected = truth(deep(), x.double())
    recalibrate(model, [x[a:b] for a, b in itertools.pairwise(edges)])
    single = {name: (mean.float(), var.float()) for name, (mean, var) in expected.items()}
    assert_statistics(model, single, rtol=2e-5, atol=2e-6)


def test_running_statistics_before_do_not_matter_not_even_infinite_ones():
    model, x = deep(), images()
    expected = truth(model, x)
    model.bn1.running_mean.fill_(torch.inf)
    model.bn3.running_var.fill_(torch.nan)
    report = recalibrate(model, x.split(8))
    assert_statistics(model, expected, rtol=1e-11, atol=1e-12)
    assert report.layers[0].shift == torch.inf


def test_recalibrating_twice_changes_nothing():
    model, x = deep(), images()
    recalibrate(model, x.split(7))
    before = snapshot(model)
    report = recalibrate(model, x.split(7))
    assert_unchanged(model, before)
    assert max(layer.shift for layer in report.layers) == 0
    assert max(layer.stretch for layer in report.layers) == 1


def test_pooled_is_exact_for_the_first_layer_and_misses_the_next_by_batch_noise():
    model, x = deep(), images()
    expected = truth(model, x)
    report = recalibrate(model, x.split(8), method="pooled")
    assert report.num_passes == 1
    assert report.residual is None
    assert_statistics(model, {"bn1": expected["bn1"]}, rtol=1e-12, atol=1e-12)
    miss = (model.bn2.running_mean - expected["bn2"][0]).abs().max()
    assert 1e-6 < miss < 0.3


def test_pooled_in_one_batch_is_exact():
    model, x = deep(), images()
    expected = truth(model, x)
    recalibrate(model, [x], method="pooled")
    assert_statistics(model, expected, rtol=1e-12, atol=1e-12)


def test_paper_averages_batch_means_and_unbiased_batch_variances():
    model, x = nn.Sequential(nn.BatchNorm1d(3).double()), torch.randn(30, 3, dtype=torch.float64)
    parts = x.split(10)
    report = recalibrate(model, parts, method="paper")
    # Algorithm 2, line 10: E_B[μ_B] and m/(m − 1) E_B[σ²_B], m = 10.
    mean = sum(p.mean(0) for p in parts) / 3
    var = 10 / 9 * sum(p.var(0, correction=0) for p in parts) / 3
    assert_statistics(model, {"0": (mean, var)}, rtol=1e-12, atol=1e-14)
    pooled = x.var(0)
    gap = (((var + 1e-5) / (pooled + 1e-5)).sqrt() - 1).abs().max().item()
    assert report.layers[0].paper_gap == pytest.approx(gap, rel=1e-9)


def test_paper_note_where_batches_are_sorted_by_class():
    model = nn.Sequential(nn.BatchNorm1d(1))
    batches = [torch.randn(20, 1) + 10 * k for k in range(4)]
    report = recalibrate(model, batches, method="paper")
    assert model[0].running_var.item() == pytest.approx(1, rel=0.4)  # the pooled one is about 126
    assert report.layers[0].paper_gap > 0.8
    assert any("sorted by class" in note for note in report.notes)
    assert "paper's std off by" in str(report)


def test_paper_and_exact_agree_on_one_batch():
    model, other, x = deep(), deep(), images()
    recalibrate(model, [x], method="paper")
    recalibrate(other, [x], method="exact")
    assert_statistics(model, {n: (b.running_mean, b.running_var) for n, b in norms(other).items()})
