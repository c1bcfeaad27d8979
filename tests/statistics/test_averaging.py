"""Averaged weights: SWA and EMA models get the statistics of their own activations."""

import copy

import pytest
import torch
from population import assert_statistics, assert_unchanged, deep, images, norms, snapshot, truth
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from batchnorm.statistics import recalibrate


def trained(model: nn.Module, averaged: AveragedModel | None = None) -> nn.Module:
    """A few steps that move weights and running statistics; the average takes each of them in."""
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    for part in images().split(8):
        model.train()
        model(part).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if averaged is not None:
            averaged.update_parameters(model)
    return model


def swa(model: nn.Module, use_buffers: bool) -> AveragedModel:
    return AveragedModel(model, use_buffers=use_buffers)


def ema(model: nn.Module, use_buffers: bool) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers)


@pytest.mark.parametrize("use_buffers", [True, False], ids=["buffers averaged", "buffers copied"])
@pytest.mark.parametrize("kind", [swa, ema])
@pytest.mark.parametrize("method", ["exact", "pooled"])
def test_averaged_models_get_the_statistics_of_the_averaged_weights(kind, use_buffers, method):
    model, x = deep(), images()
    averaged = kind(model, use_buffers)
    trained(model, averaged)
    source, before = snapshot(model), snapshot(averaged)
    expected = truth(averaged.module, x)
    miss = max((n.running_mean - expected[k][0]).abs().max() for k, n in norms(averaged.module).items())
    assert miss > 0.01  # neither averaged nor copied buffers fit the averaged weights
    report = recalibrate(averaged, [x] if method == "pooled" else x.split([13, 26, 1]), method=method)
    assert_statistics(averaged.module, expected, rtol=1e-10, atol=1e-11)
    assert [layer.name for layer in report.layers] == ["bn1", "bn2", "bn3", "bn4"]
    assert averaged.n_averaged == 5
    assert_unchanged(averaged, before, but_statistics=True)
    assert_unchanged(model, source)


def test_a_plain_copy_with_weights_averaged_by_hand():
    model, x = deep(), images()
    average = copy.deepcopy(model)
    trained(model)
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    expected = truth(average, x)
    recalibrate(average, x.split(9))
    assert_statistics(average, expected, rtol=1e-10, atol=1e-11)


def test_an_average_made_from_a_model_in_evaluation_mode_is_not_taken_for_frozen():
    model, x = deep(), images()
    averaged = AveragedModel(model.eval())  # the wrapper is in training mode, what it holds is not
    assert averaged.training
    expected = truth(averaged.module, x)
    assert len(recalibrate(averaged, x.split(9)).layers) == 4
    assert_statistics(averaged.module, expected, rtol=1e-10, atol=1e-11)
    assert averaged.training
    assert not averaged.module.training


def test_swa_update_bn_row_layers_that_are_frozen_in_the_average_stay_so():
    model, x = deep().train(), images()
    model.bn1.eval()
    averaged = AveragedModel(model)
    before = norms(averaged.module)["bn1"].running_mean.clone()
    report = recalibrate(averaged, x.split(9))
    assert [layer.name for layer in report.layers] == ["bn2", "bn3", "bn4"]
    assert torch.equal(averaged.module.bn1.running_mean, before)
    assert [m.training for m in (averaged, averaged.module, averaged.module.bn1)] == [True, True, False]


def test_an_average_of_a_model_in_a_data_parallel_wrapper():
    model, x = deep(), images()
    averaged = AveragedModel(nn.DataParallel(model))
    expected = truth(averaged.module.module, x)
    recalibrate(averaged, x.split(9))
    assert_statistics(averaged.module.module, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("keeps_averaged", [True, False])
def test_averaged_buffers_stay_where_the_users_metric_is_better_with_them(keeps_averaged):
    model, x = deep(), images()
    averaged = trained_average(model)
    target = copy.deepcopy(averaged.module).eval()
    if not keeps_averaged:
        recalibrate(target, x.split(9))
    wanted = target(x)
    before = snapshot(averaged)

    def loss(network: nn.Module) -> torch.Tensor:
        return (network(x) - wanted).square().mean()

    report = recalibrate(averaged, x.split(9), metric=loss, higher_is_better=False, keep_better=True)
    assert report.kept_old is keeps_averaged
    # The one that is kept gives the outputs by which it was judged.
    averaged.eval()
    torch.testing.assert_close(averaged(x), wanted, rtol=1e-9, atol=1e-9)
    averaged.train(before["training"][0])
    if keeps_averaged:
        assert_unchanged(averaged, before)


def trained_average(model: nn.Module) -> AveragedModel:
    averaged = swa(model, use_buffers=True)
    trained(model, averaged)
    return averaged


def test_a_metric_may_go_through_the_wrapper_that_it_closes_over():
    model, x = deep(), images()
    averaged = trained_average(model)
    before = snapshot(averaged)

    def metric(network: nn.Module) -> torch.Tensor:
        assert network is averaged.module
        return averaged.eval()(x).square().mean()

    report = recalibrate(averaged, x.split(9), metric=metric)
    assert report.metric.old != report.metric.new
    assert_unchanged(averaged, before, but_statistics=True)
