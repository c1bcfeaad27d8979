"""Ghost batch normalization: each virtual batch as if alone, statistics of the whole, plain in evaluation."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import assert_as_exact_as_eager
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import batchnorm as bn
from batchnorm.functional import ACTIVATIONS, batch_norm, ghost_batch_norm
from batchnorm.statistics import commit_on_step

SHAPES = {
    "N C": ((12, 5), 4),
    "a remainder of one": ((9, 5), 4),
    "a remainder, two sizes": ((11, 3), 3),
    "smaller than a ghost": ((3, 4), 8),
    "N C L": ((10, 3, 7), 5),
    "one example each, with locations": ((4, 3, 7), 1),
    "N C H W, nothing divides": ((7, 6, 5, 3), 2),
    "one channel": ((6, 1, 3, 3), 2),
    "N C D H W": ((6, 3, 2, 3, 2), 3),
}


def members(num: int, ghost_size: int) -> list[list[int]]:
    """Which examples make up each ghost, by the documented rule."""
    num_ghosts = max(num // ghost_size, 1)
    size, num_larger = divmod(num, num_ghosts)
    cut = num_larger * (size + 1)
    larger = [list(range(g, cut, num_larger)) for g in range(num_larger)]
    others = num_ghosts - num_larger
    return larger + [list(range(cut + g, num, others)) for g in range(others)]


def one_by_one(x, weight, bias, *, ghost_size, eps=1e-5, activation=None, residual=None, mask=None):
    """The definition: torch's function on each ghost by itself."""
    y = torch.zeros_like(x)
    for chosen in members(x.shape[0], ghost_size):
        part = x[chosen]
        if mask is None:
            z = F.batch_norm(part, None, None, weight, bias, True, 0.0, eps)
        else:
            rows, shown = part.movedim(1, -1), mask[chosen]
            num_shown = max(int(shown.sum()), 1)
            mean = rows[shown].sum(0) / num_shown
            var = (rows[shown] - mean).square().sum(0) / num_shown
            z = ((rows - mean) / (var + eps).sqrt() * weight + bias).movedim(-1, 1)
        z = z if residual is None else z + residual[chosen]
        z = z if activation is None else getattr(F, activation)(z)
        y = y.index_copy(0, torch.tensor(chosen), z if mask is None else z * mask[chosen].unsqueeze(1))
    return y


def ours(*args, **options):
    return ghost_batch_norm(*args, **options)[0]


def with_gradients(f, x, weight, bias, dy, residual, **options):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    extra = None if residual is None else residual.detach().requires_grad_()
    y = f(*leaves, residual=extra, **options)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves), *([] if extra is None else [extra.grad])]


def compare(
    shape, ghost_size, dtype=torch.float32, *, offset=0.0, activation=None, fused=False, masked=False
):
    x = (torch.randn(shape, dtype=torch.float64) + offset).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias = (
        (torch.rand(shape[1], dtype=torch.float64) + 0.5).to(wide),
        torch.randn(shape[1], dtype=wide),
    )
    residual = torch.randn(shape).to(dtype) if fused else None
    mask = None
    if masked:
        mask = torch.rand(shape[:1] + shape[2:]) > 0.3
        mask.view(-1)[::2] = True
    options = {"ghost_size": ghost_size, "activation": activation, "mask": mask}
    dy = torch.randn(shape).to(dtype)
    got = with_gradients(ours, x, weight, bias, dy, residual, **options)
    eager = with_gradients(one_by_one, x, weight, bias, dy, residual, **options)
    doubles = [None if t is None else t.double() for t in (x, weight, bias, dy, residual)]
    truth = with_gradients(one_by_one, *doubles, **options)
    # Of the sums: where these cancel, roundings of their terms remain.
    smallest = min(
        doubles[0][g].movedim(1, -1).flatten(0, -2).std(0).min() for g in members(shape[0], ghost_size)
    )
    along = doubles[3].abs().max().item() * 1.5 / (smallest.item() + 3e-3)
    terms = (doubles[3].abs().sum() * doubles[0].abs().max()).item()
    for name, g, e, t in zip(("y", "dx", "dweight", "dbias", "dresidual"), got, eager, truth, strict=False):
        assert g.dtype == (dtype if name in ("y", "dx", "dresidual") else wide)
        many = {"dweight": terms, "dbias": terms, "dx": along}.get(name, 0.0)
        assert_as_exact_as_eager(g, e, t, condition=abs(offset) + 50, terms=many, name=name)


@pytest.mark.parametrize(("shape", "ghost_size"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fusion", [{}, {"fused": True, "activation": "relu"}], ids=["plain", "fused"])
def test_every_ghost_is_normalized_as_if_alone(shape, ghost_size, dtype, fusion):
    compare(shape, ghost_size, dtype, **fusion)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_every_activation(activation, masked):
    compare((7, 3, 5), 2, torch.float64, activation=activation, fused=True, masked=masked)


def test_a_mean_of_1e4_with_deviation_1():
    compare((9, 3, 8), 3, torch.float32, offset=1e4)


@given(
    num=st.integers(2, 17),
    size=st.integers(2, 20),
    places=st.lists(st.integers(1, 4), max_size=2),
    fused=st.booleans(),
    masked=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_any_batch_and_ghost_size(num, size, places, fused, masked):
    torch.manual_seed(num)
    compare((num, 3, *places), size, torch.float64, fused=fused, masked=masked and len(places) > 0)


@given(num=st.integers(1, 300), size=st.integers(1, 64))
@settings(deadline=None)
def test_no_example_is_left_out_and_no_ghost_is_small(num, size):
    x = torch.arange(float(num), dtype=torch.float64)[:, None, None] + torch.tensor([0.0, 0.5])
    x = x * x
    if num // size < 1 or num == 1:
        assert members(num, size) == [list(range(num))]
    y, moments = ghost_batch_norm(x.repeat_interleave(2, 1)[:, :1], ghost_size=size, eps=0.0)
    assert moments.count == 2 * num
    sizes = set()
    for chosen in members(num, size):
        sizes.add(len(chosen))
        part = y[chosen]
        torch.testing.assert_close(part.mean(), part.new_zeros(()), atol=1e-9, rtol=0)
        torch.testing.assert_close(part.var(unbiased=False), part.new_ones(()), atol=1e-9, rtol=0)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(size, num)
    assert max(sizes) < 2 * size or num < size


def test_one_ghost_is_plain_to_the_bit():
    x, weight, bias = torch.randn(8, 3, 5), torch.rand(3), torch.randn(3)
    y, moments = ghost_batch_norm(x, weight, bias, ghost_size=8, activation="gelu")
    expected, whole = batch_norm(x, weight, bias, activation="gelu")
    assert torch.equal(y, expected)
    assert torch.equal(moments.var, whole.var)


@pytest.mark.parametrize("ghost_size", [2, 3, 4, 100])
def test_moments_are_those_of_the_whole_batch(ghost_size):
    x = torch.randn(10, 3, 4, dtype=torch.float64) + torch.arange(10)[:, None, None]
    mask = torch.rand(10, 4) > 0.4
    for m in (None, mask):
        _, moments = ghost_batch_norm(x, ghost_size=ghost_size, mask=m)
        expected = bn.Moments.of(x, mask=m)
        torch.testing.assert_close(moments.mean, expected.mean)
        torch.testing.assert_close(moments.var, expected.var)
        assert int(moments.count) == int(expected.count)


def test_gradcheck_and_gradgradcheck():
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)
    for m in (None, mask):

        def f(x, weight, bias, residual, m=m):
            return ours(x, weight, bias, ghost_size=2, activation="tanh", residual=residual, mask=m)

        given = (leaf(5, 2, 2), leaf(2), leaf(2), leaf(5, 2, 2))
        assert torch.autograd.gradcheck(f, given)
        assert torch.autograd.gradgradcheck(f, given)


@pytest.mark.parametrize("num", [8, 9])
@pytest.mark.parametrize("layout", ["channels last", "strided", "transposed", "expanded"])
def test_the_layout_of_the_input_is_kept_and_changes_nothing(layout, num):
    x = torch.randn(num, 4, 3, 5)
    if layout == "channels last":
        given = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        given = torch.randn(num, 4, 3, 10)[..., ::2].copy_(x)
    elif layout == "transposed":
        given = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        given = x[:, :, :, :1].expand_as(x)
        x = given.contiguous()
    residual, dy, weight = torch.randn_like(x), torch.randn_like(x), torch.rand(4)
    found = []
    for t in (given, x):
        leaves = [v.detach().requires_grad_() for v in (t, weight, residual)]
        y = ours(leaves[0], leaves[1], ghost_size=4, residual=leaves[2], activation="silu")
        y.backward(dy)
        found.append([y, *(v.grad for v in leaves)])
    assert found[0][0].stride() == torch.empty_like(given).stride()
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_features_last_is_features_first_transposed():
    x, weight, bias = torch.randn(8, 6, 4), torch.rand(4), torch.randn(4)
    mask = torch.rand(8, 6) > 0.3
    for m in (None, mask):
        last = ours(x, weight, bias, ghost_size=4, channel_dim=-1, mask=m)
        first = ours(x.movedim(-1, 1).contiguous(), weight, bias, ghost_size=4, mask=m)
        torch.testing.assert_close(last, first.movedim(1, -1))
        assert last.is_contiguous()


def test_masks_of_nothing_and_of_one_sample():
    x = torch.randn(6, 3, 4, requires_grad=True)
    hidden = torch.zeros(6, 4, dtype=torch.bool)
    y, moments = ghost_batch_norm(x, torch.rand(3), torch.rand(3), ghost_size=2, mask=hidden)
    assert y.abs().max() == 0
    assert int(moments.count) == 0
    y.backward(torch.randn_like(y))
    assert x.grad.abs().max() == 0
    # A ghost with a single sample that counts gives β there: its deviation is zero.
    hidden[0, 0] = True
    bias = torch.rand(3)
    y, moments = ghost_batch_norm(x, torch.rand(3), bias, ghost_size=2, mask=hidden)
    torch.testing.assert_close(y[0, :, 0], bias)
    assert int(moments.count) == 1


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (4, 3, 0)], ids=str)
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(shape):
    weight = torch.ones(3, requires_grad=True)
    y, moments = ghost_batch_norm(torch.randn(shape), weight, ghost_size=2)
    assert y.shape == shape
    assert int(moments.count) == 0
    y.backward(torch.randn_like(y))
    assert weight.grad.tolist() == [0, 0, 0]
    layer = bn.GhostBatchNorm1d(3, ghost_size=2)
    layer(torch.randn(shape))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("x", "options", "error", "says"),
    [
        (torch.randn(4, 3), {"ghost_size": 0}, ValueError, "positive whole number of examples, got 0"),
        (torch.randn(4, 3), {"ghost_size": -2}, ValueError, "got -2"),
        (torch.randn(4, 3), {"ghost_size": True}, ValueError, "got True"),
        (torch.randn(4, 3), {"ghost_size": 2.0}, ValueError, r"got 2\.0"),
        (torch.randn(4, 3), {"ghost_size": 1}, ValueError, "ghost_size=1, those of an input .* hold one"),
        (torch.randn(1, 3), {"ghost_size": 4}, ValueError, "more than one value per channel"),
        (torch.randn(4, 3), {"ghost_size": 2, "weight": torch.ones(2)}, ValueError, "weight must have one"),
        (torch.ones(4, 3).long(), {"ghost_size": 2}, TypeError, "floating-point"),
        (torch.randn(4, 3, 2), {"ghost_size": 2, "mask": torch.ones(4).bool()}, ValueError, "mask must have"),
    ],
)
def test_bad_input_says_what_is_wrong(x, options, error, says):
    with pytest.raises(error, match=says):
        ghost_batch_norm(x, **options)


def test_a_layer_says_where_it_stands():
    net = nn.Sequential(nn.Linear(3, 3), bn.GhostBatchNorm1d(3, ghost_size=1))
    with pytest.raises(ValueError, match=r"GhostBatchNorm1d\(3\) at '1': a ghost must hold more than one"):
        net(torch.randn(4, 3))
    with pytest.raises(TypeError, match="ghost_size"):
        bn.GhostBatchNorm1d(3)
    assert "ghost_size=1" in repr(net)


LAYERS = {
    "1d": (bn.GhostBatchNorm1d, bn.BatchNorm1d, 3, (9, 3, 4)),
    "2d": (bn.GhostBatchNorm2d, bn.BatchNorm2d, 3, (8, 3, 4, 4)),
    "3d": (bn.GhostBatchNorm3d, bn.BatchNorm3d, 3, (5, 3, 2, 2, 2)),
    "per activation": (bn.GhostBatchNormPerActivation, bn.BatchNormPerActivation, (3, 4), (9, 3, 4)),
}


@pytest.mark.parametrize(("ghost", "plain", "of", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("momentum", [0.3, None])
def test_statistics_state_dicts_and_evaluation_are_those_of_the_plain_layer(
    ghost, plain, of, shape, momentum
):
    ours, theirs = ghost(of, momentum=momentum, ghost_size=2), plain(of, momentum=momentum)
    for step in range(3):
        x = torch.randn(shape) * (step + 1) + step
        y = ours(x)
        assert not torch.allclose(y, theirs(x), atol=1e-3)
        flat = x.flatten(1) if isinstance(of, tuple) else x
        expected = one_by_one(flat, None, None, ghost_size=2).reshape(shape)
        torch.testing.assert_close(y, expected)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, msg=lambda m, n=name: f"{n}: {m}")
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    ours.train().frozen = True
    assert torch.equal(ours(x), theirs(x))
    assert isinstance(ours, plain)


def test_without_statistics_ghosts_normalize_in_evaluation_too():
    layer = bn.GhostBatchNorm1d(3, track_running_stats=False, ghost_size=4).eval()
    x = torch.randn(8, 3)
    torch.testing.assert_close(layer(x), one_by_one(x, None, None, ghost_size=4))


@pytest.mark.parametrize("poison", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("num", [8, 9])
def test_a_batch_with_one_ghost_that_is_not_finite_moves_no_statistics(poison, num):
    layer = bn.GhostBatchNorm1d(3, ghost_size=4)
    layer(torch.randn(8, 3))
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(num, 3)
    x[2, 1] = poison
    y = layer(x)
    assert y[5].isfinite().all()
    assert not y[2].isfinite().all()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_moves_statistics_once(reentrant):
    layer = bn.GhostBatchNorm1d(3, ghost_size=3)
    once = copy.deepcopy(layer)
    x = torch.randn(7, 3, requires_grad=True)
    dy = torch.randn(7, 3)
    checkpoint(layer, x, use_reentrant=reentrant).backward(dy)
    got, x.grad = x.grad, None
    once(x).backward(dy)
    assert torch.equal(got, x.grad)
    assert torch.equal(layer.running_var, once.running_var)
    assert layer.num_batches_tracked == 1


def test_commit_on_step_moves_once_by_all_micro_batches():
    model, plain = nn.Sequential(bn.GhostBatchNorm1d(3, ghost_size=3)), bn.BatchNorm1d(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = commit_on_step(model, optimizer)
    x = torch.randn(12, 3)
    for part in x.split([5, 7]):
        model(part).backward(torch.randn(part.shape))
    assert model[0].num_batches_tracked == 0
    optimizer.step()
    handle.remove()
    plain(x)
    assert model[0].num_batches_tracked == 1
    torch.testing.assert_close(model[0].running_var, plain.running_var)
    torch.testing.assert_close(model[0].running_mean, plain.running_mean)


@pytest.mark.parametrize("case", ["whole", "remainder", "masked", "features last", "cumulative"])
def test_compiles_in_one_graph_with_the_same_numbers(case):
    last = {"channel_dim": -1} if case == "features last" else {}
    momentum = None if case == "cumulative" else 0.1
    layer = bn.GhostBatchNorm1d(3, momentum=momentum, activation="relu", ghost_size=2, **last)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    shape = (6, 4, 3) if last else (7 if case == "remainder" else 6, 3, 4)
    mask = torch.rand(6, 4) > 0.2 if case == "masked" else None
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    compiled(x, mask=mask).backward(dy)
    got, x.grad = x.grad, None
    eager(x, mask=mask).backward(dy)
    torch.testing.assert_close(got, x.grad, rtol=1e-5, atol=1e-5)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_vmap_over_training_mode():
    layer = bn.GhostBatchNorm1d(3, ghost_size=2, momentum=1.0)
    x = torch.randn(5, 4, 3)
    y = torch.vmap(layer)(x)
    for lane, expected in zip(y, x, strict=True):
        torch.testing.assert_close(lane, one_by_one(expected, None, None, ghost_size=2))
    torch.testing.assert_close(layer.running_var, x.flatten(0, 1).var(0))
    assert layer.num_batches_tracked == 1


def test_copies_and_pickles_keep_the_ghost_size():
    layer = bn.GhostBatchNorm2d(3, ghost_size=5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.ghost_size == 5


@pytest.mark.parametrize("num", [8, 9])
@pytest.mark.parametrize("affine", [True, False])
def test_forgotten_outputs_are_computed_again_by_ghosts(num, affine):
    from batchnorm.layers.recompute import Saver

    torch.manual_seed(0)
    layer = bn.GhostBatchNorm2d(4, affine=affine, activation="relu", ghost_size=4)
    if affine:
        nn.init.normal_(layer.weight)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 2, 3))
    twin, x = copy.deepcopy(net), torch.randn(num, 3, 6, 6)
    dy = torch.randn(num, 2, 4, 4)
    twin(x).backward(dy)
    with Saver() as saver:
        y = net(x)
        held = saver.num_bytes(set())
        y.backward(dy)
    with Saver(forget=False) as saver:
        y = net(x)
        held_otherwise = saver.num_bytes(set())
    assert (held < held_otherwise) == (num == 8)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5)
