"""The metric before and after, and which statistics stay."""

import math

import pytest
import torch
from population import assert_unchanged, deep, images, norms, snapshot
from torch import Tensor, nn

from batchnorm.statistics import MetricChange, recalibrate


def shift(value: float = 0.0) -> nn.Module:
    """A normalization whose running mean is ``value`` and whose data have mean 10."""
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False)).double()
    model[0].running_mean.fill_(value)
    model[0].num_batches_tracked.fill_(77)
    return model


DATA = torch.arange(6, 15, dtype=torch.float64).view(9, 1)


def running_mean(model: nn.Module) -> Tensor:
    return model[0].running_mean


CASES = {
    "an accuracy that rises": (True, 0.0, 10.0, False),
    "an accuracy that falls": (True, 20.0, 10.0, True),
    "a loss that rises": (False, 0.0, 10.0, True),
    "a loss that falls": (False, 20.0, 10.0, False),
    "no difference": (True, 10.0, 10.0, False),
}


@pytest.mark.parametrize(("higher", "old", "new", "worse"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("keep", [False, True], ids=["new at any rate", "keep better"])
def test_old_statistics_stay_where_the_metric_is_worse_and_keep_better_asks(higher, old, new, worse, keep):
    model = shift(old)
    report = recalibrate(model, [DATA], metric=running_mean, higher_is_better=higher, keep_better=keep)
    assert (report.metric.old, report.metric.new) == (old, pytest.approx(new))
    assert report.metric.is_worse is worse
    assert report.metric.gain == pytest.approx((new - old) if higher else (old - new))
    assert report.kept_old is (keep and worse)
    kept = (old, 1.0, 77) if keep and worse else (10.0, 7.5, 1)
    layer = model[0]
    assert (layer.running_mean.item(), layer.running_var.item()) == pytest.approx(kept[:2])
    assert layer.num_batches_tracked == kept[2]
    # The report tells both, whichever stays.
    assert report.layers[0].new_mean.item() == pytest.approx(10)
    assert report.layers[0].old_mean.item() == old


def test_the_report_says_what_was_kept_and_by_which_numbers():
    lines = str(recalibrate(shift(20.0), [DATA], metric=running_mean, keep_better=True)).splitlines()
    assert lines[0].startswith("measured 1 layer, ")
    assert "metric: 20 before, 10 after, worse (higher is better)" in lines
    assert "the old statistics are kept: nothing was changed" in lines
    better = str(recalibrate(shift(0.0), [DATA], metric=running_mean))
    assert "metric: 0 before, 10 after, better (higher is better)" in better
    assert "kept" not in better


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [(math.nan, 1.0, False), (1.0, math.nan, True), (math.nan, math.nan, False), (math.inf, 1.0, True)],
)
def test_nan_is_worse_than_any_number(old, new, worse):
    assert MetricChange(old, new, higher_is_better=True).is_worse is worse


def test_statistics_that_overflowed_are_replaced():
    model = shift(math.nan)
    assert not recalibrate(model, [DATA], metric=running_mean, keep_better=True).kept_old
    assert model[0].running_mean.item() == pytest.approx(10)


def test_the_metric_sees_the_network_as_it_will_be_used_and_may_do_what_it_likes():
    model, x = deep(), images()
    model.train()
    before = snapshot(model)
    seen = []

    def metric(given: nn.Module) -> float:
        assert given is model
        assert not any(m.training for m in given.modules())
        assert not torch.is_grad_enabled()
        seen.append((given.bn1.running_mean.clone(), torch.rand(1).item()))
        given.train()
        given(x)  # moves running statistics, and draws dropout
        return len(seen)

    report = recalibrate(nn.DataParallel(model), x.split(9), metric=metric)
    assert (report.metric.old, report.metric.new) == (1, 2)
    assert seen[0][1] == seen[1][1]  # the same random numbers
    assert torch.equal(seen[0][0], before["state"]["bn1.running_mean"])
    assert torch.equal(seen[1][0], model.bn1.running_mean)
    assert torch.equal(report.layers[0].new_mean, model.bn1.running_mean)
    assert_unchanged(model, before, but_statistics=True)


def test_the_gain_is_measured_with_the_statistics_that_stay():
    model, x = deep(), images()
    report = recalibrate(model, x.split(9), metric=lambda m: m(x).square().mean(), higher_is_better=False)
    model.eval()
    assert report.metric.new == pytest.approx(model(x).square().mean().item(), rel=1e-12)
    assert report.metric.new != report.metric.old


@pytest.mark.parametrize("fails_at", [1, 2], ids=["before", "after"])
def test_a_metric_that_raises_leaves_no_trace(fails_at):
    model, calls = deep(), []
    model.train()
    before = snapshot(model)

    def metric(_: nn.Module) -> float:
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyError("labels")
        return 0.0

    with pytest.raises(KeyError, match="labels"):
        recalibrate(model, [images()], metric=metric)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "got None"),
        ({"accuracy": 0.9}, "got dict"),
        (torch.ones(3), r"got a tensor of shape \(3,\)"),
    ],
    ids=["nothing", "a dict", "a vector"],
)
def test_a_metric_that_is_no_number_is_refused(value, says):
    model = deep()
    before = snapshot(model)
    with pytest.raises(TypeError, match="must return one number.*" + says):
        recalibrate(model, [images()], metric=lambda _: value)
    assert_unchanged(model, before)


def test_keep_better_without_a_metric_is_refused():
    model = deep()
    with pytest.raises(ValueError, match="keep_better needs a metric"):
        recalibrate(model, [images()], keep_better=True)
    assert norms(model)["bn1"].num_batches_tracked == 77
