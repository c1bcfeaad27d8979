"""Batch renormalization: corrected towards running statistics; plain at r = 1, d = 0 and in evaluation."""

import copy
import functools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.functional import batch_norm, batch_renorm, normalize_with
from batchnorm.kernels import use
from batchnorm.layers.renorm import D_MAX, R_MAX
from batchnorm.statistics import commit_on_step


def by_hand(x, mean, var, weight, bias, *, r_max, d_max, eps=1e-5, activation=None, residual=None, mask=None):
    """Algorithm 1 of the paper, sample by sample of each channel, σ from the running variance."""
    rows = x.movedim(1, -1)
    counted = rows.flatten(0, -2) if mask is None else rows[mask]
    mu = counted.mean(0)
    sigma = ((counted - mu).square().mean(0) + eps).sqrt()
    running = (var + eps).sqrt()
    r = (sigma.detach() / running).clamp(1 / r_max, r_max)
    d = ((mu.detach() - mean) / running).clamp(-d_max, d_max)
    y = (((rows - mu) / sigma * r + d) * weight + bias).movedim(-1, 1)
    y = y if residual is None else y + residual
    y = y if activation is None else getattr(F, activation)(y)
    return y if mask is None else torch.where(mask.unsqueeze(1), y, 0)


def ours(x, mean, var, weight, bias, **options):
    return batch_renorm(x, mean, var, weight, bias, **options)[0]


def case(shape, dtype=torch.float64):
    """Channels that are within the limits, and far beyond them on either side."""
    num = shape[1]
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    mean = torch.linspace(-6, 8, num, dtype=dtype)
    var = torch.logspace(-2, 2, num, dtype=dtype)
    return x, mean, var, torch.rand(num, dtype=dtype) + 0.5, torch.randn(num, dtype=dtype)


SHAPES = [(6, 5), (2, 7), (1, 4, 6), (4, 6, 3), (3, 5, 4, 2), (2, 1, 3, 3), (2, 3, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.5, 0.5), (3.0, 5.0), (1.0, 5.0), (4.0, 0.0), (1e6, 1e6)])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_values_and_gradients_are_those_of_the_definition(shape, limits, masked):
    x, mean, var, weight, bias = case(shape)
    residual, dy = torch.randn_like(x), torch.randn_like(x)
    mask = None
    if masked:
        mask = torch.rand(shape[:1] + shape[2:]) > 0.3
        mask.view(-1)[:2] = True
    found = []
    for f in (ours, by_hand):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, residual)]
        options = {"r_max": limits[0], "d_max": limits[1], "activation": "silu", "mask": mask}
        y = f(leaves[0], mean, var, leaves[1], leaves[2], residual=leaves[3], **options)
        y.backward(dy)
        found.append([y, *(t.grad for t in leaves)])
    for name, got, expected in zip(("y", "dx", "dweight", "dbias", "dresidual"), *found, strict=True):
        scale = expected.abs().max().item() + 1
        torch.testing.assert_close(
            got, expected, rtol=1e-9, atol=1e-11 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@given(
    shape=st.lists(st.integers(2, 6), min_size=2, max_size=4),
    r_max=st.floats(1, 50),
    d_max=st.floats(0, 50),
    offset=st.floats(-100, 100),
    affine=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_limits(shape, r_max, d_max, offset, affine):
    x, mean, var, weight, bias = case(shape)
    given = (weight, bias) if affine else (None, None)
    y = ours(x + offset, mean, var, *given, r_max=r_max, d_max=d_max)
    one, zero = torch.ones_like(mean), torch.zeros_like(mean)
    expected = by_hand(
        x + offset, mean, var, *((weight, bias) if affine else (one, zero)), r_max=r_max, d_max=d_max
    )
    torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_keep_statistics_in_float32(dtype):
    x, mean, var, weight, bias = (t.float() for t in case((16, 5, 6)))
    x = x.to(dtype)
    y, moments = batch_renorm(x, mean, var, weight, bias, r_max=3, d_max=5)
    expected = by_hand(x.double(), *(t.double() for t in (mean, var, weight, bias)), r_max=3, d_max=5)
    assert y.dtype == dtype
    assert moments.mean.dtype == torch.float32
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double(), expected, rtol=2 * rounding, atol=20 * torch.finfo(torch.float32).eps
    )


@pytest.mark.parametrize("shape", [(64, 5, 8, 8), (8, 5)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_without_room_it_is_plain_to_the_bit(shape, last):
    x, mean, var, weight, bias = case(shape, torch.float32)
    if last:
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    one = torch.tensor(1.0)
    for r_max, d_max in ((1, 0), (one, one * 0)):
        found = []
        renorm = functools.partial(batch_renorm, mean=mean, var=var, r_max=r_max, d_max=d_max)
        for f in (renorm, batch_norm):
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            y, moments = f(leaves[0], weight=leaves[1], bias=leaves[2], activation="relu")
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
            found.append([y, moments.mean, moments.var, *(t.grad for t in leaves)])
        for got, expected in zip(*found, strict=True):
            assert torch.equal(got, expected)
            assert got.stride() == expected.stride()


def test_within_the_limits_it_is_what_inference_computes():
    x, _, _, weight, bias = case((8, 5, 6))
    mean, var = x.mean((0, 2)) + 0.3, x.var((0, 2)) * 1.4
    y = ours(x, mean, var, weight, bias, r_max=3, d_max=5)
    torch.testing.assert_close(y, normalize_with(x, mean, var, weight, bias))


@pytest.mark.parametrize("kernel", ["auto", "reference", "torch"])
def test_gradients_do_not_flow_through_the_correction(kernel):
    # The correction is a constant of the batch, so finite differences must hold it.
    x, mean, var, weight, bias = case((5, 3, 2))
    rows = x.movedim(1, -1).flatten(0, -2)
    sigma, running = (rows.var(0, unbiased=False) + 1e-5).sqrt(), (var + 1e-5).sqrt()
    r, d = (sigma / running).clamp(1 / 3, 3), ((rows.mean(0) - mean) / running).clamp(-5, 5)

    def held(x, weight, bias):
        return batch_norm(x, weight * r, bias + weight * d)[0]

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(held, leaves)
    dy = torch.randn_like(x)
    with use(kernel):
        got = torch.autograd.grad(ours(x, mean, var, weight, bias, r_max=3, d_max=5), leaves, dy)
    for g, e in zip(got, torch.autograd.grad(held(*leaves), leaves, dy), strict=True):
        torch.testing.assert_close(g, e)
    for t in (mean, var):
        t.requires_grad_()
    assert torch.autograd.grad(
        ours(x, mean, var, weight, bias, r_max=3, d_max=5), [mean, var], dy, allow_unused=True
    ) == (None, None)


def test_second_derivatives_are_those_of_the_definition():
    x, mean, var, weight, bias = case((5, 3, 2))
    found = []
    for f in (ours, by_hand):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = f(leaves[0], mean, var, *leaves[1:], r_max=2, d_max=1, activation="tanh")
        (first,) = torch.autograd.grad(y, leaves[0], torch.cos(x), create_graph=True)
        found.append(torch.autograd.grad(first, leaves, torch.sin(x)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_features_last_is_features_first_transposed():
    x, mean, var, weight, bias = case((8, 4, 6))
    mask = torch.rand(8, 6) > 0.3
    for m in (None, mask):
        first = ours(x, mean, var, weight, bias, r_max=2, d_max=1, mask=m)
        last = ours(x.movedim(1, -1), mean, var, weight, bias, r_max=2, d_max=1, mask=m, channel_dim=-1)
        torch.testing.assert_close(last, first.movedim(1, -1))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"r_max": 0.99}, r"r_max must be a finite number of 1 or more, got 0\.99"),
        ({"r_max": -3}, "r_max .* got -3"),
        ({"r_max": float("nan")}, "r_max .* got nan"),
        ({"r_max": float("inf")}, "r_max .* got inf"),
        ({"r_max": "3"}, "r_max .* got '3'"),
        ({"d_max": -0.1}, r"d_max must be a finite number of 0 or more, got -0\.1"),
        ({"d_max": None}, "d_max .* got None"),
        ({"mean": torch.zeros(2)}, r"mean must have one entry per channel, \(3,\), got \(2,\)"),
        ({"var": torch.zeros(3, 1)}, r"var must have one entry per channel, \(3,\), got \(3, 1\)"),
        ({"x": torch.randn(1, 3)}, "more than one value per channel"),
        ({"eps": -1.0}, "eps must not be negative"),
    ],
)
def test_bad_input_says_what_is_wrong(options, says):
    given = {"x": torch.randn(4, 3), "mean": torch.zeros(3), "var": torch.ones(3), **options}
    with pytest.raises(ValueError, match=says):
        batch_renorm(**given)


def test_masks_of_nothing_and_empty_batches():
    mean, var, weight = torch.rand(3), torch.rand(3), torch.ones(3, requires_grad=True)
    hidden = torch.zeros(4, dtype=torch.bool)
    y, moments = batch_renorm(torch.randn(4, 3), mean, var, weight, mask=hidden)
    assert y.abs().max() == 0
    assert int(moments.count) == 0
    y, moments = batch_renorm(torch.randn(0, 3), mean, var, weight)
    assert y.shape == (0, 3)
    y.backward(torch.randn_like(y))
    assert weight.grad.tolist() == [0, 0, 0]
    layer = bn.BatchRenorm1d(3, r_max=3, d_max=5)
    layer(torch.randn(4, 3), mask=hidden)
    layer(torch.randn(0, 3))
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"BatchRenorm1d\(3\): a batch must hold more than one value"):
        layer(torch.randn(1, 3))


# The layers.

LAYERS = {
    "1d": (bn.BatchRenorm1d, bn.BatchNorm1d, 3, (9, 3, 4)),
    "2d": (bn.BatchRenorm2d, bn.BatchNorm2d, 3, (8, 3, 4, 4)),
    "3d": (bn.BatchRenorm3d, bn.BatchNorm3d, 3, (5, 3, 2, 2, 2)),
    "per activation": (bn.BatchRenormPerActivation, bn.BatchNormPerActivation, (3, 4), (9, 3, 4)),
}


@pytest.mark.parametrize(("renorm", "plain", "of", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_layer_corrects_towards_its_running_statistics(renorm, plain, of, shape, momentum):
    ours, theirs = renorm(of, momentum=momentum, r_max=1.5, d_max=0.5), plain(of, momentum=momentum)
    for step in range(4):
        x = torch.randn(shape) * (step + 1) + step
        flat = x.flatten(1) if isinstance(of, tuple) else x
        mean, var = ours.running_mean.flatten().clone(), ours.running_var.flatten().clone()
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        limits = {"r_max": 1.5, "d_max": 0.5} if step else {"r_max": 1, "d_max": 0}
        y, expected = ours(x), by_hand(flat, mean, var, one, zero, **limits).reshape(shape)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(y, theirs(x), atol=1e-5) == (step == 0)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=lambda m, n=name: f"{n}: {m}")
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    ours.train().frozen = True
    assert torch.equal(ours(x), theirs(x))
    assert isinstance(ours, plain)


def test_the_papers_schedule():
    assert [R_MAX(s) for s in (0, 5_000, 22_500, 40_000, 10**9)] == [1, 1, 2, 3, 3]
    assert [D_MAX(s) for s in (0, 5_000, 15_000, 25_000, 10**9)] == [0, 0, 2.5, 5, 5]
    assert D_MAX(torch.tensor(15_000)).item() == 2.5
    layer = bn.BatchRenorm1d(3)
    assert (layer.r_max, layer.d_max) == (R_MAX, D_MAX)
    plain = bn.BatchNorm1d(3)
    for _ in range(3):
        x = torch.randn(6, 3)
        torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("tracked", [0, 1, 6, 20])
def test_a_schedule_goes_on_where_the_state_dict_left_it(tracked):
    layer = bn.BatchRenorm1d(3, r_max=bn.Ramp(1.0, 3.0, 2, 10), d_max=lambda step: step / 4)
    state = layer.state_dict()
    state["num_batches_tracked"].fill_(tracked)
    state["running_mean"].fill_(7.0)
    resumed = bn.BatchRenorm1d(3, r_max=bn.Ramp(1.0, 3.0, 2, 10), d_max=lambda step: step / 4)
    resumed.load_state_dict(state)
    limits = {0: (1, 0), 1: (1, 0.25), 6: (2, 1.5), 20: (3, 5)}[tracked]
    assert resumed.limits() == limits
    x = torch.randn(6, 3)
    mean, var, one = torch.full((3,), 7.0), torch.ones(3), torch.ones(3)
    expected = by_hand(x, mean, var, one, one * 0, r_max=limits[0], d_max=limits[1])
    torch.testing.assert_close(resumed(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("r_max", "d_max", "says"),
    [
        (0.5, 5.0, "r_max must be a finite number of 1 or more, got 0.5"),
        (3.0, -1.0, "d_max must be a finite number of 0 or more, got -1.0"),
        (lambda step: 0, 5.0, "r_max .* got 0"),
        (3.0, lambda step: "much", "d_max .* got 'much'"),
    ],
)
def test_limits_that_make_no_sense_are_refused_at_once(r_max, d_max, says):
    with pytest.raises(ValueError, match=says):
        bn.BatchRenorm1d(3, r_max=r_max, d_max=d_max)


def test_limits_that_make_no_sense_later_are_refused_then():
    layer = bn.BatchRenorm1d(3, r_max=lambda step: 3 - step, d_max=0.0)
    net = nn.Sequential(layer)
    for _ in range(3):
        net(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"BatchRenorm1d\(3\) at '0': at step 3, r_max must .* got 0"):
        net(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((1.0, 3.0, 10, 10), "first < last"),
        ((1.0, 3.0, -1, 10), "0 <= first"),
        ((1.0, torch.inf, 0, 9), "finite"),
    ],
)
def test_ramps_that_make_no_sense(arguments, says):
    with pytest.raises(ValueError, match=says):
        bn.Ramp(*arguments)


def test_it_needs_running_statistics():
    with pytest.raises(ValueError, match="it needs track_running_stats=True"):
        bn.BatchRenorm1d(3, track_running_stats=False)


def trained(**options):
    layer = bn.BatchRenorm1d(3, momentum=0.5, r_max=1.5, d_max=0.5, **options).double()
    nn.init.normal_(layer.weight)
    for step in range(3):
        layer(torch.randn(8, 3).double() * 3 + step)
    return layer


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_correction_of_the_first_run(reentrant):
    # By then the running statistics have moved, and so has the schedule.
    layer = trained()
    layer.d_max = lambda step: step / 10
    once = copy.deepcopy(layer)
    parts = [torch.randn(7, 3).double().requires_grad_() for _ in range(3)]
    dy = torch.randn(3, 7, 3).double()
    ys = [checkpoint(layer, x, use_reentrant=reentrant) for x in parts]
    torch.stack(ys).backward(dy)
    got = [x.grad for x in parts]
    weight_grad = layer.weight.grad
    for x in parts:
        x.grad = None
    torch.stack([once(x) for x in parts]).backward(dy)
    for x, g in zip(parts, got, strict=True):
        assert torch.equal(g, x.grad)
    torch.testing.assert_close(weight_grad, once.weight.grad, rtol=1e-12, atol=0)
    assert torch.equal(layer.running_var, once.running_var)
    assert layer.num_batches_tracked == once.num_batches_tracked == 6


def test_a_correction_that_is_kept_no_more_is_missed():
    layer = trained()
    first = checkpoint(layer, torch.randn(7, 3).double().requires_grad_(), use_reentrant=False)
    for _ in range(20):
        layer(torch.randn(7, 3).double())
    with pytest.raises(RuntimeError, match="more than 16 batches after it was run"):
        first.backward(torch.randn(7, 3).double())


def test_commit_on_step_counts_steps_of_the_optimizer():
    model = nn.Sequential(trained())
    layer = model[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    seen = []
    layer.r_max = lambda step: seen.append(step) or 1.5
    for _ in range(2):
        for part in torch.randn(2, 6, 3).double():
            before = layer.running_mean.clone()
            expected = by_hand(
                part, before, layer.running_var, layer.weight, layer.bias, r_max=1.5, d_max=0.5
            )
            y = model(part)
            torch.testing.assert_close(y, expected)
            y.backward(torch.randn_like(y))
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    assert seen == [3, 3, 4, 4]
    assert layer.num_batches_tracked == 5
    assert not torch.equal(layer.running_mean, mean)
    assert not torch.equal(layer.running_var, var)


@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
def test_a_batch_that_is_not_finite_moves_no_statistics_and_no_schedule(poison):
    layer = trained()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(8, 3).double()
    x[2, 1] = poison
    y = layer(x)
    assert y[:, [0, 2]].isfinite().all()
    assert not y[:, 1].isfinite().any()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("case", ["whole", "masked", "features last", "cumulative", "first"])
def test_compiles_in_one_graph_with_the_same_numbers(case):
    last = {"channel_dim": -1} if case == "features last" else {}
    ramp = {"r_max": bn.Ramp(1.0, 3.0, 0, 4), "d_max": lambda step: step / 10}
    layer = bn.BatchRenorm1d(
        3, activation="relu", momentum=None if case == "cumulative" else 0.1, **ramp, **last
    )
    shape = (6, 4, 3) if last else (6, 3, 4)
    for _ in range(0 if case == "first" else 2):
        layer(torch.randn(shape) * 2 + 1)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mask = torch.rand(6, 4) > 0.2 if case == "masked" else None
    for step in range(3):
        x, dy = (torch.randn(shape) + step).requires_grad_(), torch.randn(shape)
        y = compiled(x, mask=mask)
        y.backward(dy)
        got, x.grad = x.grad, None
        expected = eager(x, mask=mask)
        expected.backward(dy)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-5)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_vmap_over_an_ensemble():
    members = [trained() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = torch.randn(3, 8, 3).double()
    y = torch.vmap(lambda p, b, lane: torch.func.functional_call(members[0], (p, b), (lane,)))(
        parameters, buffers, x
    )
    for member, lane, got in zip(members, x, y, strict=True):
        torch.testing.assert_close(got, member(lane))
    torch.testing.assert_close(buffers["running_var"], torch.stack([m.running_var for m in members]))


def test_copies_and_pickles_keep_the_limits_and_no_batch():
    layer = bn.BatchRenorm2d(3, r_max=2.0, d_max=bn.Ramp(0.0, 1.0, 1, 2))
    layer(torch.randn(4, 3, 2, 2))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert (twin.r_max, twin.d_max) == (2.0, bn.Ramp(0.0, 1.0, 1, 2))
        assert not twin._corrections._kept
    assert "r_max=2.0, d_max=Ramp(start=0.0, end=1.0, first=1, last=2)" in repr(layer)


def test_forgotten_outputs_are_computed_again_with_the_correction():
    from batchnorm.layers.recompute import Saver

    layer = bn.BatchRenorm2d(4, activation="relu", r_max=1.5, d_max=0.5)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 3)).double()
    net(torch.randn(8, 3, 6, 6).double())
    twin, x, dy = copy.deepcopy(net), torch.randn(8, 3, 6, 6).double() + 1, torch.randn(8, 2, 4, 4).double()
    twin(x).backward(dy)
    with Saver() as saver:
        y = net(x)
        held = saver.num_bytes(set())
        y.backward(dy)
    with Saver(forget=False) as saver:
        y = net(x)
        assert held < saver.num_bytes(set())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
