"""Fitted weights of examples: the smallest distance from what training computes, by brute force."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.statistics import fit_example_weights

KINDS = {
    "2d": (bn.EvalNorm2d, 3, (3, 4, 4), {}),
    "features last": (bn.EvalNorm1d, 3, (5, 3), {"channel_dim": -1}),
    "(N, C)": (bn.EvalNorm1d, 3, (3,), {}),
    "per activation": (bn.EvalNormPerActivation, (3, 2), (3, 2), {}),
}


def drawn(num, size, shape, channel_dim=1):
    """Batches whose examples differ in level more than their positions do."""
    places = list(shape)
    if len(shape) > 1:
        places = [1] * len(shape)
        place = 0 if channel_dim == 1 else -1
        places[place] = shape[place]
    return (torch.randn(num * size, *shape) + 2 * torch.randn(num * size, *places)).split(size)


def distance(layer, batches, weight, masks=None):
    """Mean square distance of evaluation from training, before γ and β, in float64."""
    twin = copy.deepcopy(layer).double()
    for parameter in twin.parameters():
        parameter.data.fill_(1.0 if parameter is twin.weight else 0.0)
    twin.example_weight, twin.activation = weight, None
    total = count = 0.0
    for i, batch in enumerate(batches):
        mask = None if masks is None else masks[i]
        off = copy.deepcopy(twin).train()(batch.double(), mask=mask) - twin.eval()(batch.double(), mask=mask)
        total += off.square().sum().item()
        count += off.numel() if mask is None else mask.sum().item() * layer.num_features
    return total / count


@pytest.mark.parametrize(("cls", "size", "shape", "options"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("batch", [2, 6])
def test_the_weight_is_where_the_distance_is_smallest(cls, size, shape, options, batch):
    torch.manual_seed(4)
    batches = drawn(40, batch, shape, options.get("channel_dim", 1))
    model = nn.Sequential(cls(size, batch_size=3, activation="relu", momentum=None, **options))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for x in batches:
        model(x)
    before = copy.deepcopy(model.state_dict())
    report = fit_example_weights(model, batches)
    (found,) = report.layers
    layer = model[0]
    assert (found.name, found.old, layer.example_weight) == ("0", 1 / 3, found.new)
    for value, weight in ((found.error_plain, 0.0), (found.error_old, 1 / 3), (found.error_new, found.new)):
        assert value**2 == pytest.approx(distance(layer, batches, weight), rel=1e-5)
    grid = torch.linspace(0, 1, 41).tolist()
    best = min(grid, key=lambda w: distance(layer, batches, w))
    assert abs(found.new - best) <= 0.025
    assert found.error_new <= min(found.error_plain, found.error_old)
    after = model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if n != "0.example_weight")
    assert layer.training


def test_padding_is_left_out_and_examples_of_nothing_do_no_harm():
    torch.manual_seed(5)
    layer = bn.EvalNorm1d(3, batch_size=3)
    batches, masks = torch.randn(20, 4, 3, 6), torch.rand(20, 4, 6) < 0.6
    masks[3, 1] = False
    for x, mask in zip(batches, masks, strict=True):
        layer(x, mask=mask)
    hidden = torch.where(masks.unsqueeze(2), batches, torch.nan)
    given = [{"x": x, "mask": mask} for x, mask in zip(hidden, masks, strict=True)]
    (found,) = fit_example_weights(layer, given).layers
    assert found.name == ""
    assert found.error_new**2 == pytest.approx(distance(layer, batches, found.new, masks), rel=1e-5)
    best = min(torch.linspace(0, 1, 41).tolist(), key=lambda w: distance(layer, batches, w, masks))
    assert abs(found.new - best) <= 0.025


def test_large_batches_leave_an_example_little_weight():
    torch.manual_seed(6)
    weights = []
    for size in (2, 8, 64):
        layer = bn.EvalNorm2d(4, example_weight=0.5, momentum=None)
        batches = drawn(256 // size, size, (4, 3, 3))
        for x in batches:
            layer(x)
        fit_example_weights(layer, batches)
        weights.append(layer.example_weight)
    assert weights[0] > weights[1] > weights[2]
    assert weights[0] == pytest.approx(0.55, abs=0.15)
    assert weights[2] < 0.05


def test_what_is_left_alone_is_named():
    model = nn.ModuleDict(
        {
            "used": bn.EvalNorm1d(2, batch_size=2),
            "unused": bn.EvalNorm1d(2, batch_size=2),
            "frozen": bn.EvalNorm1d(2, batch_size=2),
            "bare": bn.EvalNorm1d(2, batch_size=2, track_running_stats=False),
        }
    )
    model["frozen"].frozen = True
    report = fit_example_weights(
        model, torch.randn(5, 4, 2), forward=lambda m, x: m["bare"](m["frozen"](m["used"](x)))
    )
    assert [w.name for w in report.layers] == ["used"]
    assert report.notes == (
        "'frozen' left alone: it is frozen",
        "'bare' left alone: it keeps no running statistics",
        "'unused' unchanged: no batch reached it",
    )
    assert "used: weight 0.5 → " in str(report)
    assert model["unused"].example_weight == 0.5


BAD = {
    "no module": (lambda: ([], []), TypeError, "needs a torch.nn.Module, got list"),
    "no such layer": (lambda: (nn.BatchNorm1d(2), []), ValueError, "BatchNorm1d has no layer whose examples"),
    "no batches": (lambda: (bn.EvalNorm1d(2, batch_size=2), []), ValueError, "none of 0 batches reached any"),
    "one value": (
        lambda: (bn.EvalNorm1d(2, batch_size=2), [torch.randn(1, 2)]),
        ValueError,
        "more than one value per channel",
    ),
    "not finite": (
        lambda: (bn.EvalNorm1d(2, batch_size=2), [torch.tensor([[1.0, torch.inf], [2.0, 1.0]])]),
        ValueError,
        "that are not finite",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_nothing_changed(make, error, message):
    model, batches = make()
    with pytest.raises(error, match=message):
        fit_example_weights(model, batches)
    if isinstance(model, bn.EvalNorm1d):
        assert model.example_weight == 0.5
        assert not model.num_batches_tracked
