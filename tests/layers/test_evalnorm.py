"""Example weighing at inference: the derived expectation, by simulation; and plain where it should be."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.layers.evalnorm import blended

CLASSES = {
    "1d (N, C)": (bn.EvalNorm1d, bn.BatchNorm1d, 4, (4,), {}),
    "1d (N, C, L)": (bn.EvalNorm1d, bn.BatchNorm1d, 4, (4, 6), {}),
    "features last": (bn.EvalNorm1d, bn.BatchNorm1d, 4, (6, 4), {"channel_dim": -1}),
    "2d": (bn.EvalNorm2d, bn.BatchNorm2d, 4, (4, 3, 5), {}),
    "3d": (bn.EvalNorm3d, bn.BatchNorm3d, 4, (4, 3, 2, 2), {}),
    "per activation": (bn.EvalNormPerActivation, bn.BatchNormPerActivation, (4, 2), (4, 2), {}),
}
IDS = {"argvalues": CLASSES.values(), "ids": CLASSES}


def trained(cls, size, shape, options, **weight):
    layer = cls(size, dtype=torch.float64, **options, **weight)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):
        layer(torch.randn(6, *shape, dtype=torch.float64) * 3 + 2)
    return layer


def reference(x, layer, weight):
    """One example, (samples, C), by the formula of the card."""
    x = x.double()
    own_mean, own_var = x.mean(0), x.var(0, correction=0)
    gap, count = own_mean - layer.running_mean, len(x)
    mean = layer.running_mean + weight * gap
    var = (1 - weight) * (1 - weight / count) * layer.running_var
    var = var + weight * own_var + weight * (1 - weight) * gap**2
    return layer.weight.detach() * (x - mean) / (var + layer.eps).sqrt() + layer.bias.detach()


@pytest.mark.parametrize(("cls", "plain", "size", "shape", "options"), **IDS)
def test_each_example_is_normalized_by_its_own_blend(cls, plain, size, shape, options):
    layer = trained(cls, size, shape, options, batch_size=4).eval()
    x = torch.randn(5, *shape, dtype=torch.float64) * 2 + 1
    y = layer(x)
    assert y.shape == x.shape
    if cls is bn.EvalNormPerActivation:
        expected = torch.stack([reference(example[None], layer, 0.25)[0] for example in x])
    elif options:
        expected = torch.stack([reference(example, layer, 0.25) for example in x])
    else:
        rows = [
            reference(example.flatten(1).T if example.dim() > 1 else example[None], layer, 0.25)
            for example in x
        ]
        expected = torch.stack([r.T.reshape(shape) for r in rows])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("cls", "plain", "size", "shape", "options"), **IDS)
def test_weight_zero_is_plain_and_training_always_is_to_the_bit(cls, plain, size, shape, options):
    torch.manual_seed(1)
    none = cls(size, example_weight=0, activation="relu", **options)
    some = cls(size, batch_size=2, activation="relu", **options)
    usual = plain(size, activation="relu", **options)
    for _ in range(3):
        x = torch.randn(4, *shape) + 1
        y = usual(x)
        assert torch.equal(none(x), y)
        assert torch.equal(some(x), y)
    assert torch.equal(some.running_var, usual.running_var)
    assert torch.equal(none.eval()(x), usual.eval()(x))
    assert not torch.allclose(some.eval()(x), usual(x))


@pytest.mark.parametrize(("cls", "plain", "size", "shape", "options"), **IDS)
def test_an_example_does_not_see_the_others(cls, plain, size, shape, options):
    layer = trained(cls, size, shape, options, batch_size=2).eval().float()
    x = torch.randn(5, *shape)
    y = layer(x)
    others = x.clone()
    others[[0, 2, 3, 4]] = torch.nan
    assert torch.equal(layer(others)[1], y[1])
    torch.testing.assert_close(layer(x[1:2])[0], y[1])


SIZES = {"pairs": (2, 6, 0.7), "fours, one value each": (4, 1, 1.0), "eights, unlike examples": (8, 5, 3.0)}


@pytest.mark.parametrize(("batch", "places", "between"), SIZES.values(), ids=SIZES)
def test_the_blend_is_the_expectation_of_a_training_batch_with_the_example(batch, places, between):
    """Many batches that hold one example: their mean and biased variance, on average."""
    num = 200_000
    within = 0.0 if places == 1 else 1.0

    def examples(count):
        level = between * torch.randn(count, 1, dtype=torch.float64) + 1
        return level + within * torch.randn(count, places, dtype=torch.float64)

    # What training averages: unbiased variances of batches of that size.
    training = examples(num * batch).reshape(num, -1)
    running = training.mean(), training.var(1).mean()
    example = torch.tensor([2.5, 2.0, 3.5, 1.0, 4.0, 5.0], dtype=torch.float64)[:places]
    with_it = torch.cat([example.expand(num, -1), examples(num * (batch - 1)).reshape(num, -1)], 1)
    means, variances = with_it.mean(1), with_it.var(1, correction=0)
    layer = bn.EvalNorm1d(1, batch_size=batch, eps=0.0, affine=False, dtype=torch.float64).eval()
    layer.running_mean.fill_(running[0])
    layer.running_var.fill_(running[1])
    y = layer(example.reshape(1, 1, -1)).flatten()
    expected = (example - means.mean()) / variances.mean().sqrt()
    # A tenth of what the plain layer misses by, and no more than five standard errors.
    torch.testing.assert_close(y, expected, rtol=0.01, atol=0.01)
    plain = (example - running[0]) / running[1].sqrt()
    assert (plain - expected).abs().max() > 10 * (y - expected).abs().max()


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_moments_are_over_the_positions_that_count(channel_dim):
    shape = (4, 6) if channel_dim == 1 else (6, 4)
    layer = trained(bn.EvalNorm1d, 4, shape, {"channel_dim": channel_dim}, batch_size=4).eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [2], [0]])
    hidden = torch.where(mask.unsqueeze(channel_dim), x, torch.nan)
    y = layer(hidden, mask=mask)
    for example, out, shown in zip(x.movedim(channel_dim, -1), y.movedim(channel_dim, -1), mask, strict=True):
        if shown.any():
            torch.testing.assert_close(out[shown], reference(example[shown], layer, 0.25))
        assert not out[~shown].any()


def test_an_example_of_nothing_is_expected_to_be_as_the_population():
    mean, var = torch.tensor([2.0, -1.0]), torch.tensor([3.0, 0.5])
    nothing = torch.zeros(2, 2)
    blend = blended(nothing, nothing, torch.tensor([[0], [4]]), mean, var, 0.5)
    assert torch.equal(blend[0][0], mean)
    assert torch.equal(blend[1][0], var)
    torch.testing.assert_close(blend[0][1], mean / 2)


def test_one_value_per_channel_under_a_mask_and_empty_inputs():
    layer = trained(bn.EvalNorm1d, 3, (3,), {}, batch_size=2).eval()
    x = torch.randn(4, 3, dtype=torch.float64)
    mask = torch.tensor([True, False, True, False])
    y = layer(torch.where(mask[:, None], x, torch.nan), mask=mask)
    torch.testing.assert_close(y[0], reference(x[:1], layer, 0.5)[0])
    assert not y[~mask].any()
    for shape in ((0, 3), (0, 3, 5), (4, 3, 0)):
        assert layer(torch.empty(shape, dtype=torch.float64)).shape == shape


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_gradients_in_evaluation_go_through_the_own_moments(channel_dim):
    shape = (3, 4) if channel_dim == 1 else (4, 3)
    layer = trained(bn.EvalNorm1d, 3, shape, {"channel_dim": channel_dim}, batch_size=3).eval()
    layer.activation = "tanh"
    mask = torch.tensor([[True, True, True, False], [True, False, False, True]])
    x, residual = (torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, r: layer(x, r, mask), (x, residual))
    assert torch.autograd.gradgradcheck(lambda x, r: layer(x, r, mask), (x, residual))


def test_the_weight_is_saved_and_a_plain_dict_leaves_it(tmp_path):
    import safetensors.torch

    layer = bn.EvalNorm2d(3, batch_size=3)
    layer(torch.randn(4, 3, 2, 2))
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(layer.state_dict(), path)
    other = bn.EvalNorm2d(3, batch_size=8)
    other.load_state_dict(safetensors.torch.load_file(path))
    assert other.example_weight == 1 / 3
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    other.load_state_dict(nn.BatchNorm2d(3).state_dict())
    assert other.example_weight == 1 / 3
    assert "example_weight=0.3" in repr(other)
    saved = layer.state_dict() | {"example_weight": torch.tensor(2.0)}
    with pytest.raises(ValueError, match=r"example_weight must be a number from 0 to 1, got 2\.0"):
        other.load_state_dict(saved)


def test_frozen_it_is_its_evaluation_and_fold_says_why_it_is_left():
    layer = bn.EvalNorm2d(3, batch_size=2)
    layer(torch.randn(4, 3, 2, 2))
    x = torch.randn(2, 3, 4, 4)
    expected = layer.eval()(x)
    bn.freeze(nn.Sequential(layer))
    assert torch.equal(layer.train()(x), expected)
    bn.thaw(nn.Sequential(layer))
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer).eval()
    new, report = bn.fold(model, x)
    assert torch.equal(new(x), model(x))
    assert [str(r.reason) for r in report.refusals] == [layer.mixes]
    assert "depends on the example" in layer.mixes
    layer.example_weight = 0.0
    new, report = bn.fold(model, x)
    assert not report.refusals
    torch.testing.assert_close(new(x), model(x))


def test_it_compiles_in_one_graph():
    layer = bn.EvalNorm2d(3, batch_size=2, activation="relu")
    layer(torch.randn(4, 3, 2, 2))
    layer.eval()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    for shape in ((2, 3, 4, 4), (5, 3, 2, 6)):
        x = torch.randn(shape, dtype=torch.bfloat16)
        y = compiled(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, layer(x))
        torch.testing.assert_close(y.float(), layer(x.float()), rtol=2**-7, atol=2**-7)


BAD = {
    "both": ({"batch_size": 2, "example_weight": 0.5}, "one of them"),
    "neither": ({}, "one of them"),
    "no batch": ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
    "true": ({"batch_size": True}, "batch_size must be a whole number"),
    "above one": ({"example_weight": 1.5}, r"example_weight must be a number from 0 to 1, got 1\.5"),
    "not a number": ({"example_weight": float("nan")}, "from 0 to 1, got nan"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_weights_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        bn.EvalNorm1d(4, **given)
    with pytest.raises(ValueError, match=message):
        bn.convert(nn.Sequential(nn.BatchNorm1d(4)), to="evalnorm", **given)
