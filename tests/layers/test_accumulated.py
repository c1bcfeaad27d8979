"""Accumulated Batch Normalization: against the moments of all samples in the window, in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.layers.accumulated import _merged
from batchnorm.moments import Moments

CLASSES = {
    "1d (N, C)": (bn.AccumulatedBatchNorm1d, bn.BatchNorm1d, 5, (5,), {}),
    "1d (N, C, L)": (bn.AccumulatedBatchNorm1d, bn.BatchNorm1d, 5, (5, 3), {}),
    "features last": (bn.AccumulatedBatchNorm1d, bn.BatchNorm1d, 5, (3, 5), {"channel_dim": -1}),
    "2d": (bn.AccumulatedBatchNorm2d, bn.BatchNorm2d, 5, (5, 2, 3), {}),
    "3d": (bn.AccumulatedBatchNorm3d, bn.BatchNorm3d, 5, (5, 2, 1, 3), {}),
    "per activation": (bn.AccumulatedBatchNormPerActivation, bn.BatchNormPerActivation, (5, 2), (5, 2), {}),
}


def learned(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def normalized(x, whole, eps, gamma, beta, channel_dim=1):
    """``x`` by the moments of ``whole``, all channels last."""
    rows = whole.movedim(channel_dim, -1).reshape(-1, whole.shape[channel_dim])
    mean, var = rows.mean(0), rows.var(0, correction=0)
    return (gamma * (x.movedim(channel_dim, -1) - mean) / (var + eps).sqrt() + beta).movedim(-1, channel_dim)


@pytest.mark.parametrize(("cls", "plain", "size", "shape", "options"), CLASSES.values(), ids=CLASSES)
def test_a_micro_batch_is_normalized_by_itself_and_those_before(cls, plain, size, shape, options):
    layer = learned(cls(size, micro_batches=3, dtype=torch.float64, **options))
    stream = torch.randn(21, *shape, dtype=torch.float64) * 2 + 50
    parts = stream.split([2, 5, 1, 4, 3, 6])
    for i, x in enumerate(parts):
        window = torch.cat(parts[max(0, i - 2) : i + 1])
        y = layer(x)
        if cls is bn.AccumulatedBatchNormPerActivation:
            gamma, beta, x, window = (
                layer.weight.flatten(),
                layer.bias.flatten(),
                x.flatten(1),
                window.flatten(1),
            )
            expected = normalized(x, window, layer.eps, gamma, beta).reshape(y.shape)
        else:
            dim = options.get("channel_dim", 1)
            expected = normalized(x, window, layer.eps, layer.weight, layer.bias, dim)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_when_it_equals_the_big_batch_and_when_not():
    torch.manual_seed(1)
    big = nn.Sequential(nn.Linear(4, 5), bn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), bn.BatchNorm1d(5))
    big = big.double()
    small, _ = bn.convert(big, to="accumulated", micro_batches=4)
    x = torch.randn(12, 4, dtype=torch.float64)
    truth = [big[:2](x), big(x)]
    parts, expected = x.split(3), [t.split(3) for t in truth]
    # The first layer, once the window is full: to rounding. The ones after it see what came before.
    outputs = [(small[:2](p), copy.deepcopy(small)) for p in parts]
    torch.testing.assert_close(outputs[3][0], expected[0][3], rtol=1e-12, atol=1e-12)
    assert (outputs[2][0] - expected[0][2]).abs().max() > 0.05
    small[1].restart()
    off = [
        max((small(p) - e).abs().max().item() for p, e in zip(parts, expected[1], strict=True)) for _ in "abc"
    ]
    # Each time around without a change of weights, one more layer is that of the big batch.
    assert off[0] > off[1] > 0.01
    assert off[2] < 1e-12


def test_with_one_micro_batch_it_is_plain_to_the_bit():
    layer, plain = (learned(c) for c in (bn.AccumulatedBatchNorm1d(4, micro_batches=1), bn.BatchNorm1d(4)))
    plain.load_state_dict(layer.state_dict(), strict=False)
    for _ in range(3):
        x = torch.randn(6, 4)
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_var, plain.running_var)
    assert torch.equal(layer.eval()(x), plain.eval()(x))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("channel_dim", [1, -1])
def test_gradients_are_those_of_algorithm_1_with_means_of_this_micro_batch(masked, channel_dim):
    layer = learned(
        bn.AccumulatedBatchNorm1d(3, micro_batches=3, dtype=torch.float64, channel_dim=channel_dim)
    )
    shape = (2, 3, 4) if channel_dim == 1 else (2, 4, 3)
    for _ in range(2):
        layer(torch.randn(shape, dtype=torch.float64) + 1)
    mask = torch.ones(2, 4, dtype=torch.bool)
    if masked:
        mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    names = ("window_mean", "window_var", "window_count")
    window = [tuple(getattr(layer, name)[i].clone() for name in names) for i in range(2)]
    x, residual = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = layer(x, residual, mask if masked else None)
    dy = torch.randn(shape, dtype=torch.float64)
    y.backward(dy)
    rows, d_rows = (t.detach().movedim(channel_dim, -1)[mask] for t in (x, dy))
    whole = Moments(rows.mean(0), rows.var(0, correction=0), len(rows))
    for mean, var, count in window:
        whole = whole.merge(Moments(mean, var, count))
    root = (whole.var + layer.eps).rsqrt()
    x_hat, d_hat = (rows - whole.mean) * root, d_rows * layer.weight.detach()
    expected = root * (d_hat - d_hat.mean(0) - x_hat * (d_hat * x_hat).mean(0))
    torch.testing.assert_close(x.grad.movedim(channel_dim, -1)[mask], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.weight.grad, (d_rows * x_hat).sum(0))
    torch.testing.assert_close(layer.bias.grad, d_rows.sum(0))
    torch.testing.assert_close(residual.grad.movedim(channel_dim, -1)[mask], d_rows)
    assert not x.grad.movedim(channel_dim, -1)[~mask].any()


def test_outputs_and_gradients_are_those_of_the_big_batch_where_micro_batches_are_alike():
    torch.manual_seed(2)
    plain = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), bn.BatchNorm1d(4))
    plain = plain.double()
    small, _ = bn.convert(plain, to="accumulated", micro_batches=3)
    x, dy = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    x = x[:, :3]
    plain(x.repeat(3, 1)).backward(dy.repeat(3, 1))
    for _ in range(3):
        small(x).backward(dy)
    for mine, truth in zip(small.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, truth.grad, rtol=1e-10, atol=1e-10)


def test_with_an_empty_window_gradients_are_exact():
    layer = learned(bn.AccumulatedBatchNorm1d(3, micro_batches=3, dtype=torch.float64, activation="tanh"))

    def run(x):
        layer.restart()
        return layer(x)

    assert torch.autograd.gradcheck(run, (torch.randn(4, 3, dtype=torch.float64, requires_grad=True),))


def test_no_gradient_is_left_for_a_shift_of_the_micro_batch():
    layer = learned(bn.AccumulatedBatchNorm1d(3, micro_batches=4, dtype=torch.float64))
    for _ in range(3):
        layer(torch.randn(4, 3, dtype=torch.float64) * 5)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    layer.bias.data.zero_()
    y = layer(x)
    y.backward(torch.randn(4, 3, dtype=torch.float64))
    # x̂ of this micro-batch does not sum to zero by itself: that is what the window is for.
    d_hat_x_hat = (layer.weight.grad * layer.weight.detach()) / 4
    x_hat = y.detach() / layer.weight.detach()
    root = (x_hat[0] - x_hat[1]) / (x.detach()[0] - x.detach()[1])
    torch.testing.assert_close(x.grad.sum(0), -root * d_hat_x_hat * x_hat.sum(0), rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_any_sizes_merge_as_one_set_of_samples(sizes, channels):
    x = torch.randn(sum(sizes) + 2, channels, dtype=torch.float64) * 3 + 1e4
    now, *earlier = (Moments.of(p) for p in x.split([2, *sizes]))
    counts = torch.tensor([m.count for m in earlier])
    found = _merged(
        now, torch.stack([m.mean for m in earlier]), torch.stack([m.var for m in earlier]), counts
    )
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.var, x.var(0, correction=0), rtol=1e-6, atol=1e-9)
    assert found.count == len(x)


def test_single_samples_work_once_the_window_holds_one():
    layer = bn.AccumulatedBatchNorm1d(3, micro_batches=4)
    x = torch.randn(5, 3)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"AccumulatedBatchNorm1d\(3\): .* more than one value"):
            layer(x[:1])
    layer.train()(x[:2])
    for i in (2, 3, 4):
        y = layer(x[i : i + 1])
        torch.testing.assert_close(
            y, normalized(x[i : i + 1], x[: i + 1], layer.eps, layer.weight, layer.bias)
        )
    assert layer.num_batches_tracked == 4
    assert layer.window_count.tolist() == [1, 1, 1, 2]


def test_padding_weighs_nothing():
    layer = bn.AccumulatedBatchNorm1d(2, micro_batches=2, dtype=torch.float64, affine=False)
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    masks = torch.arange(4) < torch.tensor([[[4], [1], [0]], [[2], [0], [1]]])
    hidden = torch.where(masks.unsqueeze(2), x, torch.nan)
    ones = torch.ones(2, dtype=torch.float64)
    layer(hidden[0], mask=masks[0])
    y = layer(hidden[1], mask=masks[1])
    rows = [t.movedim(1, -1)[m] for t, m in zip(x, masks, strict=True)]
    expected = normalized(rows[1], torch.cat(rows), layer.eps, ones, 0 * ones)
    torch.testing.assert_close(y.movedim(1, -1)[masks[1]], expected)
    assert not y.movedim(1, -1)[~masks[1]].any()
    assert layer.window_count.tolist() == [3, 5]


NOTHING = {
    "no examples": ((0, 3, 4), None),
    "sequence of length zero": ((5, 3, 0), None),
    "mask of all false": ((5, 3, 4), torch.zeros(5, 4, dtype=torch.bool)),
    "not finite": ((5, 3, 4), None),
}


@pytest.mark.parametrize(("shape", "mask"), NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_what_holds_no_sound_sample_neither_enters_nor_moves(shape, mask, how):
    layer = bn.AccumulatedBatchNorm1d(3, micro_batches=2)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if how == "compiled" else layer
    run(torch.randn(4, 3, 2))
    before = copy.deepcopy(layer.state_dict())
    y = run(torch.full(shape, torch.nan), mask=mask)
    assert y.shape == shape
    if mask is not None:
        assert not y.any()
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


def test_statistics_move_by_the_window_and_with_a_handle_by_the_step():
    torch.manual_seed(3)
    model = nn.Sequential(bn.AccumulatedBatchNorm1d(3, micro_batches=2, momentum=1.0), nn.Linear(3, 1))
    x = torch.randn(9, 3) + 5
    parts = x.split(3)
    for part in parts:
        model(part)
    torch.testing.assert_close(model[0].running_mean, x[3:].mean(0))
    torch.testing.assert_close(model[0].running_var, x[3:].var(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bn.commit_on_step(model, optimizer):
        for part in parts:
            model(part).sum().backward()
        optimizer.step()
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    torch.testing.assert_close(model[0].running_var, x.var(0))
    assert model[0].num_batches_tracked == 4


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_repeats_the_same_window(reentrant):
    layer = learned(bn.AccumulatedBatchNorm1d(3, micro_batches=3))
    twin = copy.deepcopy(layer)
    for _ in range(4):
        x = torch.randn(4, 3, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        dy = torch.randn(4, 3)
        y = checkpoint(layer, x, use_reentrant=reentrant)
        y.backward(dy)
        twin(z).backward(dy)
        torch.testing.assert_close(x.grad, z.grad)
    for name, t in layer.state_dict().items():
        torch.testing.assert_close(t, twin.state_dict()[name])


def test_checkpointing_out_of_order_is_refused():
    layer = bn.AccumulatedBatchNorm1d(3, micro_batches=3)
    x = torch.randn(2, 4, 3, requires_grad=True)
    first, _ = (checkpoint(layer, part, use_reentrant=False) for part in x.unbind())
    with pytest.raises(ValueError, match="runs a micro-batch again after a later one"):
        first.sum().backward()


def test_a_resumed_run_goes_on_with_the_same_bits_and_a_plain_dict_empties_nothing_else():
    layer = bn.AccumulatedBatchNorm2d(3, micro_batches=3)
    for _ in range(4):
        layer(torch.randn(2, 3, 2, 2))
    other = bn.AccumulatedBatchNorm2d(3, micro_batches=3)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(other(x), layer(x))
    saved = nn.BatchNorm2d(3).state_dict()
    names = list(saved)
    layer.load_state_dict(saved)
    assert list(saved) == names
    assert not layer.window_count.any()
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))
    layer.restart()
    assert not layer.window_count.any()
    layer(x)
    layer.reset_running_stats()
    assert not any(t.any() for t in (layer.window_count, layer.window_mean, layer.window_var))
    with pytest.raises(RuntimeError, match="size mismatch for window_mean"):
        bn.AccumulatedBatchNorm2d(3, micro_batches=2).load_state_dict(other.state_dict())


def test_evaluation_freezing_and_folding_are_the_plain_layers():
    layer = bn.AccumulatedBatchNorm1d(3, micro_batches=2, activation="relu")
    for _ in range(3):
        layer(torch.randn(4, 3) * 2 + 1)
    plain = bn.BatchNorm1d(3, activation="relu")
    plain.load_state_dict(layer.state_dict(), strict=False)
    x, state = torch.randn(4, 3), copy.deepcopy(layer.state_dict())
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    bn.freeze(nn.Sequential(layer))
    assert torch.equal(layer.train()(x), plain(x))
    assert all(torch.equal(state[name], t) for name, t in layer.state_dict().items())
    bare = bn.AccumulatedBatchNorm1d(3, micro_batches=2, track_running_stats=False).eval()
    assert torch.equal(bare(x), bn.BatchNorm1d(3, track_running_stats=False)(x))
    assert not bare.window_count.any()
    model = nn.Sequential(nn.Linear(3, 3), layer).eval()
    bn.thaw(model)
    folded, report = bn.fold(model, x)
    assert not report.refusals
    torch.testing.assert_close(folded(x), model(x))


def test_recalibration_leaves_the_window_as_it_was():
    model = nn.Sequential(bn.AccumulatedBatchNorm1d(3, micro_batches=2))
    model(torch.randn(4, 3))
    before = model[0].window_mean.clone()
    x = torch.randn(12, 3)
    bn.recalibrate(model, x.split(4), method="pooled")
    assert torch.equal(model[0].window_mean, before)
    torch.testing.assert_close(model[0].running_var, x.var(0))


def test_it_compiles_in_one_graph_and_keeps_wide_statistics():
    layer = bn.AccumulatedBatchNorm1d(3, micro_batches=3, dtype=torch.bfloat16)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for num in (4, 4, 6, 4):
        x = torch.randn(num, 3, dtype=torch.bfloat16) + 20
        torch.testing.assert_close(compiled(x), twin(x), rtol=2**-6, atol=2**-6)
    for name, t in layer.state_dict().items():
        torch.testing.assert_close(t, twin.state_dict()[name])
    assert layer.window_mean.dtype == layer.window_var.dtype == torch.float32
    layer.half()
    assert layer.window_mean.dtype == torch.float32


BAD = {"none": 0, "half": 1.5, "true": True}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_settings_that_make_no_sense_are_refused(value):
    message = f"micro_batches must be a whole number of at least 1, got {value}"
    with pytest.raises(ValueError, match=message):
        bn.AccumulatedBatchNorm1d(4, micro_batches=value)
    with pytest.raises(ValueError, match=message):
        bn.convert(nn.Sequential(nn.BatchNorm1d(4)), to="accumulated", micro_batches=value)


def test_transforms_are_refused_with_the_reason():
    layer = bn.AccumulatedBatchNorm1d(3, micro_batches=2)
    with pytest.raises(ValueError, match=r"does not move under torch\.func transforms"):
        torch.vmap(layer)(torch.randn(2, 4, 3))
