"""Iterative whitening: against an eigendecomposition, float64, and plain Batch Normalization."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import batchnorm as bn
from batchnorm.comoments import Comoments
from batchnorm.kernels import whitening

CLASSES = {
    "1d (N, C)": (bn.WhitenedBatchNorm1d, bn.BatchNorm1d, (40, 7)),
    "1d (N, C, L)": (bn.WhitenedBatchNorm1d, bn.BatchNorm1d, (8, 7, 9)),
    "2d": (bn.WhitenedBatchNorm2d, bn.BatchNorm2d, (4, 7, 5, 6)),
    "3d": (bn.WhitenedBatchNorm3d, bn.BatchNorm3d, (2, 7, 3, 4, 5)),
}


def correlated(shape, *, dtype=torch.float64, channel_dim=1, offset=3.0) -> torch.Tensor:
    """Random values whose channels are mixtures of each other."""
    num = shape[channel_dim]
    mixing = torch.randn(num, num, dtype=torch.float64) / num**0.5 + torch.eye(num, dtype=torch.float64)
    z = torch.randn(list(shape), dtype=torch.float64).movedim(channel_dim, -1)
    return (z @ mixing.T + offset).movedim(-1, channel_dim).contiguous().to(dtype)


def as_rows(x, mask=None, channel_dim=1) -> torch.Tensor:
    """(samples, C) in float64."""
    rows = x.detach().double().movedim(channel_dim, -1)
    return rows.reshape(-1, rows.shape[-1]) if mask is None else rows[mask]


def zca(x, group, eps, mask=None, channel_dim=1) -> torch.Tensor:
    """Whitened samples (samples, C), by eigendecomposition in float64, group by group."""
    rows = as_rows(x, mask, channel_dim)
    found = []
    for part in rows.split(group, dim=1):
        centred = part - part.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        found.append(centred @ vectors @ torch.diag((values + eps).rsqrt()) @ vectors.T)
    return torch.cat(found, 1)


def layer_for(cls, group=3, iterations=30, num=7, **options):
    layer = cls(num, group_channels=group, iterations=iterations, dtype=torch.float64, **options)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize(("cls", "plain", "shape"), CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("group", [1, 2, 3, 7, 100], ids=lambda g: f"groups of {g}")
def test_many_iterations_give_the_root_by_eigendecomposition(cls, plain, shape, group):
    x, layer = correlated(shape), layer_for(cls, group)
    y = layer(x)
    expected = zca(x, group, layer.eps) * layer.weight.detach() + layer.bias.detach()
    torch.testing.assert_close(as_rows(y), expected, rtol=1e-9, atol=1e-9)
    assert (y.dtype, y.shape, y.is_contiguous()) == (x.dtype, x.shape, True)


def test_five_iterations_bring_covariances_this_close_to_one():
    x = correlated((64, 8, 6, 6))
    layer = bn.WhitenedBatchNorm2d(8, affine=False, dtype=torch.float64, group_channels=4)
    for iterations, least, most in ((1, 0.1, 2.0), (5, 1e-4, 0.5), (9, 0.0, 1e-2), (14, 0.0, 1e-4)):
        layer.iterations = iterations
        for part in as_rows(layer(x)).split(4, dim=1):
            off = (torch.cov(part.T, correction=0) - torch.eye(4)).abs().max().item()
            assert least <= off <= most, (iterations, off)


def test_the_error_of_rounding_does_not_grow_with_the_iterations():
    x = correlated((50, 6)) * torch.tensor([1e-2, 1, 1, 1, 1, 30.0], dtype=torch.float64)
    truth = zca(x, 6, 1e-5)
    for iterations in (40, 400):
        layer = bn.WhitenedBatchNorm1d(6, affine=False, group_channels=6, iterations=iterations)
        assert (as_rows(layer(x.float())) - truth).abs().max() < 2e-2  # covariances of condition 10⁷


def test_covariances_far_from_zero_are_around_the_refined_mean():
    # In float32 the first mean of values near a million is off by hundredths.
    x = correlated((3000, 4), offset=1e6, dtype=torch.float32)
    found = whitening.comoments(x, 4, None, 1)
    rows = x.double()
    torch.testing.assert_close(found.mean.double(), rows.mean(0), rtol=1e-7, atol=0)
    torch.testing.assert_close(found.cov.double(), torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-5)
    wrong_mean = x.sum(0) / len(x)
    assert (wrong_mean.double() - rows.mean(0)).square().max() > 1e-4


@pytest.mark.parametrize(("cls", "plain", "shape"), CLASSES.values(), ids=CLASSES)
def test_groups_of_one_channel_are_plain_batch_normalization(cls, plain, shape):
    x = correlated(shape)
    one = cls(7, group_channels=1, iterations=3, activation="tanh", dtype=torch.float64)
    usual = plain(7, activation="tanh", dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(one(x), usual(x), rtol=1e-12, atol=1e-12)
        x = x * 2 + 1
    torch.testing.assert_close(one.running_var, usual.running_var, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.running_cov[:, 0], usual.running_var, rtol=1e-12, atol=0)
    torch.testing.assert_close(one.eval()(x), usual.eval()(x), rtol=1e-12, atol=1e-12)


GEOMETRIES = {
    "remainder": ((9, 5), 2, 1, 1e-2),
    "one group, features last": ((3, 4, 3), 3, -1, 1e-3),
    "one channel": ((6, 1, 2), 4, 1, 1e-3),
    "fewer samples than channels": ((3, 4), 4, 1, 0.1),
}


@pytest.mark.parametrize(("shape", "group", "channel_dim", "eps"), GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradients_go_through_covariances_and_iterations(shape, group, channel_dim, eps, masked):
    x = correlated(shape, channel_dim=channel_dim).requires_grad_()
    num = shape[channel_dim]
    gamma, beta = (torch.randn(num, dtype=torch.float64, requires_grad=True) for _ in range(2))
    places = list(shape)
    del places[channel_dim]
    mask = torch.rand(places) < 0.8 if masked else None
    residual = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def run(x, gamma, beta, residual):
        options = {"group": group, "iterations": 4, "channel_dim": channel_dim}
        return whitening.forward(x, gamma, beta, residual, mask, eps, "tanh", **options)[0]

    assert torch.autograd.gradcheck(run, (x, gamma, beta, residual))
    assert torch.autograd.gradgradcheck(run, (x, gamma, beta, residual))


def test_gradients_in_evaluation_are_those_of_a_fixed_map():
    layer = layer_for(bn.WhitenedBatchNorm1d, num=5, iterations=4)
    layer(correlated((30, 5)))
    layer.eval()
    x = correlated((4, 5)).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    torch.testing.assert_close(layer(x)[:2], layer(x[:2]))


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_padding_takes_no_part(channel_dim):
    x = correlated((6, 4, 5), channel_dim=1 if channel_dim == 1 else 2)
    num = x.shape[channel_dim]
    mask = torch.arange(x.shape[2 if channel_dim == 1 else 1]) < torch.tensor([5, 3, 2, 4, 1, 0])[:, None]
    x = torch.where(mask.unsqueeze(channel_dim), x, torch.nan).requires_grad_()
    layer = layer_for(bn.WhitenedBatchNorm1d, 2, num=num, affine=False, channel_dim=channel_dim)
    y = layer(x, mask=mask)
    torch.testing.assert_close(
        as_rows(y, mask, channel_dim), zca(x, 2, layer.eps, mask, channel_dim), rtol=1e-9, atol=1e-9
    )
    assert (y.movedim(channel_dim, -1)[~mask] == 0).all()
    y.backward(torch.randn_like(y))
    assert x.grad.isfinite().all()
    assert (x.grad.movedim(channel_dim, -1)[~mask] == 0).all()
    rows = as_rows(x, mask, channel_dim)
    torch.testing.assert_close(layer.running_mean, 0.1 * rows.mean(0))
    torch.testing.assert_close(layer.running_cov[:2], 0.9 * torch.eye(2) + 0.1 * torch.cov(rows[:, :2].T))


EMPTY = {
    "no examples": ((0, 3, 4), None),
    "sequence of length zero": ((5, 3, 0), None),
    "mask of all false": ((5, 3, 4), torch.zeros(5, 4, dtype=torch.bool)),
}


@pytest.mark.parametrize(("shape", "mask"), EMPTY.values(), ids=EMPTY)
def test_nothing_to_normalize_gives_zeros_and_moves_nothing(shape, mask):
    layer = layer_for(bn.WhitenedBatchNorm1d, 2, num=3)
    before = copy.deepcopy(layer.state_dict())
    x = torch.full(shape, torch.nan, dtype=torch.float64, requires_grad=True)
    y = layer(x, mask=mask)
    y.backward(torch.randn_like(y))
    assert y.shape == shape
    assert not y.any()
    assert not x.grad.any()
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


def test_a_single_value_per_channel_is_refused_in_training_alone():
    layer = bn.WhitenedBatchNorm1d(3)
    with pytest.raises(ValueError, match=r"WhitenedBatchNorm1d\(3\): .* more than one value per channel"):
        layer(torch.randn(1, 3))
    assert layer.eval()(torch.randn(1, 3)).isfinite().all()


# Running covariances.


def test_running_covariances_are_unbiased_and_merge_by_momentum():
    layer = layer_for(bn.WhitenedBatchNorm1d, 2, num=3, momentum=0.3)
    expected = torch.eye(3, dtype=torch.float64)
    for num in (4, 9):
        x = correlated((num, 3))
        layer(x)
        expected = 0.7 * expected + 0.3 * torch.cov(x.T)
    torch.testing.assert_close(layer.running_cov[:2], expected[:2, :2])
    torch.testing.assert_close(
        layer.running_cov[2], torch.stack([expected[2, 2], torch.tensor(0.0).double()])
    )
    torch.testing.assert_close(layer.running_var, expected.diagonal())
    x = correlated((5, 3))
    rows = x - layer.running_mean
    root = torch.linalg.eigh(layer.running_cov[:2] + layer.eps * torch.eye(2))
    root = root[1] @ torch.diag(root[0].rsqrt()) @ root[1].T
    whitened = torch.cat([rows[:, :2] @ root, rows[:, 2:] * (layer.running_var[2] + layer.eps).rsqrt()], 1)
    torch.testing.assert_close(layer.eval()(x), whitened * layer.weight + layer.bias)


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_comoments_merge_as_the_whole_stream(channels, group, sizes):
    x = correlated((sum(sizes) + 2, channels), offset=1e3)
    whole = whitening.comoments(x, group, None, 1)
    parts = [whitening.comoments(p, group, None, 1) for p in x.split([*sizes, 2])]
    merged = Comoments.merged(parts)
    cov = torch.cov(x.T, correction=0).reshape(channels, channels)
    for row in range(channels):
        start = row // group * group
        mine = cov[row, start : start + group]
        torch.testing.assert_close(whole.cov[row, : len(mine)], mine, rtol=1e-7, atol=1e-9)
        assert (whole.cov[row, len(mine) :] == 0).all()
    torch.testing.assert_close(merged.cov, whole.cov, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(merged.var, whole.var, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(merged.mean, whole.mean)
    for mine, theirs in zip(merged.estimates(), (x.mean(0), x.var(0)), strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(merged.estimates()[2][0, 0], x[:, 0].var(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_batch_that_is_not_finite_moves_nothing(poison, how):
    layer = bn.WhitenedBatchNorm1d(4, group_channels=3)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if how == "compiled" else layer
    run(torch.randn(8, 4))
    before = copy.deepcopy(layer.state_dict())
    bad = torch.randn(8, 4)
    bad[2, 3] = poison
    run(bad)
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


def test_statistics_stay_wide_and_keep_their_digits():
    layer = bn.WhitenedBatchNorm1d(3, dtype=torch.bfloat16)
    assert {t.dtype for t in (layer.running_mean, layer.running_var, layer.running_cov)} == {torch.float32}
    x = correlated((64, 3), dtype=torch.bfloat16)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = bn.WhitenedBatchNorm1d(3, dtype=torch.float64)
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(layer.running_cov.double(), exact.running_cov, rtol=1e-5, atol=1e-6)
    cov = layer.running_cov.clone()
    layer.half().float()
    assert torch.equal(layer.running_cov, cov)


def test_autocast_does_not_round_the_covariances():
    layer = bn.WhitenedBatchNorm1d(4)
    x = correlated((64, 4), dtype=torch.float32, offset=50)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_state_dicts_go_round_and_a_plain_one_loads_as_uncorrelated():
    layer, plain = bn.WhitenedBatchNorm2d(5, group_channels=2), nn.BatchNorm2d(5)
    for _ in range(3):
        layer(correlated((6, 5, 3, 3), dtype=torch.float32))
        plain(correlated((6, 5, 3, 3), dtype=torch.float32))
    other = bn.WhitenedBatchNorm2d(5, group_channels=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(other.eval()(x), layer.eval()(x))
    saved = plain.state_dict()
    names = list(saved)
    layer.load_state_dict(saved)
    assert list(saved) == names
    assert torch.equal(layer.running_cov[:, 0][::2], plain.running_var[::2])
    assert torch.equal(layer.running_cov[1], torch.tensor([0, plain.running_var[1]]))
    layer.iterations = 40
    torch.testing.assert_close(layer(x), plain.eval()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="size mismatch for running_cov"):
        bn.WhitenedBatchNorm2d(5, group_channels=3).load_state_dict(other.state_dict())
    other.reset_running_stats()
    assert torch.equal(other.running_cov, bn.WhitenedBatchNorm2d(5, group_channels=2).running_cov)
    bare = bn.WhitenedBatchNorm2d(5, track_running_stats=False)
    assert list(bare.state_dict()) == ["weight", "bias"]
    assert torch.equal(bare.eval()(x), bare.train()(x))


# In the rest of the house.


def test_checkpointing_moves_once_and_a_frozen_layer_not_at_all():
    layer = bn.WhitenedBatchNorm1d(4, momentum=1.0, group_channels=2)
    x = correlated((16, 4), dtype=torch.float32).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    y.backward(torch.randn_like(y))
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_cov[:2], torch.cov(x.detach()[:, :2].T))
    model = nn.Sequential(layer)
    assert not bn.freeze(model).refusals
    before = copy.deepcopy(layer.state_dict())
    other = torch.randn(8, 4)
    trained = layer.train()(other)
    assert torch.equal(trained, layer.eval()(other))
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    bn.thaw(model)
    layer.train()(other)
    torch.testing.assert_close(layer.running_cov[:2], torch.cov(other[:, :2].T))


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_commit_on_step_pools_the_covariances_of_a_step(how):
    model = nn.Sequential(bn.WhitenedBatchNorm1d(4, momentum=1.0, group_channels=3), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if how == "compiled" else model
    x = correlated((30, 4), dtype=torch.float32)
    with bn.commit_on_step(model, optimizer) as handle:
        for part in x.split([12, 8, 10]):
            y = run(part)
            y.backward(torch.randn_like(y))
        assert torch.equal(model[0].running_mean, torch.zeros(4))
        optimizer.step()
        assert handle.moves == {"0": 1}
    cov = torch.cov(x.T)
    torch.testing.assert_close(model[0].running_cov[:3], cov[:3, :3])
    torch.testing.assert_close(model[0].running_cov[3, 0], cov[3, 3])
    torch.testing.assert_close(model[0].running_var, cov.diagonal())


@pytest.mark.parametrize("method", ["exact", "pooled", "paper"])
def test_recalibration_finds_the_covariances_of_the_population(method):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Linear(3, 4), bn.WhitenedBatchNorm1d(4, group_channels=4), nn.ReLU(), nn.Linear(4, 3),
        bn.WhitenedBatchNorm1d(3, group_channels=2),
    ).double()  # fmt: skip
    x = torch.randn(60, 3, dtype=torch.float64)
    parts = [*x.split(20)]
    bn.recalibrate(model, parts, method=method)
    hidden = model[0](x).detach()
    expected = torch.cov(hidden.T)
    if method == "paper":
        expected = torch.stack([torch.cov(model[0](p).detach().T) for p in parts]).mean(0)
    torch.testing.assert_close(model[1].running_cov, expected)
    torch.testing.assert_close(model[1].running_var, expected.diagonal())
    if method == "exact":
        # What is stored is unbiased, and the second layer was settled behind a biased one.
        first = copy.deepcopy(model[1]).eval()
        first.running_cov.mul_(59 / 60)
        second = model[3](model[2](first(hidden))).detach()
        torch.testing.assert_close(model[4].running_cov[:2], torch.cov(second[:, :2].T))


@pytest.mark.parametrize("method", ["statistics", "blended"])
def test_adaptation_takes_the_covariances_along(method):
    model = nn.Sequential(bn.WhitenedBatchNorm1d(4, group_channels=3), nn.Linear(4, 2)).double()
    x = correlated((60, 4), offset=1)
    options = {"prior": 20} if method == "blended" else {}
    bn.adapt(model, x.split(20), method=method, **options)
    share = 60 / 80 if method == "blended" else 1.0
    expected = (1 - share) * torch.eye(3).double() + share * torch.cov(x[:, :3].T)
    torch.testing.assert_close(model[0].running_cov[:3], expected)
    torch.testing.assert_close(model[0].running_var[:3], expected.diagonal())


def test_populations_of_parts_merge_through_files(tmp_path):
    from batchnorm.statistics import Population

    model = nn.Sequential(bn.WhitenedBatchNorm1d(4, group_channels=3)).double()
    x = correlated((40, 4))
    for i, part in enumerate(x.split([25, 15])):
        Population.of(model, [part]).save(tmp_path / f"{i}.safetensors")
    whole = Population.merged(Population.load(tmp_path / f"{i}.safetensors") for i in range(2))
    whole.store_in(model)
    torch.testing.assert_close(model[0].running_cov[:3], torch.cov(x[:, :3].T))


def test_tools_that_know_no_covariances_say_so():
    layer = bn.WhitenedBatchNorm1d(4)
    from batchnorm.statistics.choose import store

    with pytest.raises(ValueError, match="WhitenedBatchNorm1d has running covariances"):
        store(layer, torch.zeros(4), torch.ones(4))
    x = torch.randn(8, 4)
    model = nn.Sequential(layer, nn.Linear(4, 2)).eval()
    new, report = bn.fold(model, x)
    assert torch.equal(new(x), model(x))
    assert [str(r.reason) for r in report.refusals] == [layer.mixes]
    with pytest.raises(ValueError, match="running covariances are not pooled; recalibrate"):
        bn.pool_statistics(layer)
    with pytest.raises(ValueError, match=r"do not move under torch\.func transforms"):
        torch.vmap(layer.train())(torch.randn(3, 8, 4))


def test_watch_does_not_take_the_output_for_standardized():
    model = nn.Sequential(bn.WhitenedBatchNorm1d(4, group_channels=4, iterations=1))
    recorder = bn.watch(model, layers=["0"], every=1)
    x = correlated((64, 4), dtype=torch.float32)
    y = model(x)
    from batchnorm.diagnostics.watched import Given, gives_standardized

    assert not gives_standardized(model[0], Given(x))
    assert (y.var(0) - 1).abs().max() > 0.05
    recorder.close()


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_compiled_in_one_graph_and_in_the_layout_of_the_input(fmt):
    layer = bn.WhitenedBatchNorm2d(6, group_channels=4, activation="relu")
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for shape in ((4, 6, 3, 3), (5, 6, 4, 4)):
        x = correlated(shape, dtype=torch.float32).to(memory_format=fmt)
        residual = torch.randn_like(x)
        y = compiled(x, residual)
        torch.testing.assert_close(y, twin(x, residual))
        assert y.is_contiguous(memory_format=fmt)
        assert (y >= 0).all()
    torch.testing.assert_close(layer.running_cov, twin.running_cov)


BAD = {
    "no group": ({"group_channels": 0}, "group_channels must be a whole number of at least 1, got 0"),
    "half a channel": ({"group_channels": 1.5}, "group_channels must be a whole number"),
    "no iteration": ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
    "true": ({"iterations": True}, "iterations must be a whole number of at least 1, got True"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        bn.WhitenedBatchNorm1d(4, **given)
    with pytest.raises(ValueError, match=message):
        bn.convert(nn.Sequential(nn.BatchNorm1d(4)), to="whitened", **given)
