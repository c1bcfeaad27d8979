"""Drop-in: the same numbers and state dicts as torch.nn, and what torch.nn does not have."""

import copy
import io

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.layers import Normalization, adopt

PAIRS = {
    "1d (N, C)": (bn.BatchNorm1d, nn.BatchNorm1d, (7, 4)),
    "1d (N, C, L)": (bn.BatchNorm1d, nn.BatchNorm1d, (5, 4, 9)),
    "2d": (bn.BatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 6)),
    "2d one image": (bn.BatchNorm2d, nn.BatchNorm2d, (1, 4, 5, 6)),
    "3d": (bn.BatchNorm3d, nn.BatchNorm3d, (2, 4, 3, 2, 5)),
}
OPTIONS = {
    "defaults": {},
    "cumulative": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "not affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
    "large eps": {"eps": 0.1, "momentum": 0.3},
}


def train(net: nn.Module, shape, steps=10) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    # A larger rate would double every rounding in each step: ten steps could not be compared.
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    outputs = []
    for _ in range(steps):
        x = torch.randn(shape, generator=generator) * 2 + 3
        y = net(x)
        y.backward(torch.randn(y.shape, generator=generator))
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(y.detach())
    return outputs


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS.values(), ids=PAIRS)
def test_ten_steps_equal_torchs_in_outputs_weights_and_statistics(ours, theirs, shape, options):
    torch.manual_seed(1)
    before = nn.Conv1d(4, 4, 1) if shape == (5, 4, 9) else nn.Identity()
    # A parameter before the layer, so that its input gradient counts as well.
    nets = [nn.Sequential(copy.deepcopy(before), kind(4, **options)) for kind in (ours, theirs)]
    for net in nets:
        net.append(nn.Flatten()).append(nn.Linear(int(torch.tensor(shape[1:]).prod()), 2))
    nets[1].load_state_dict(nets[0].state_dict())
    for mine, eager in zip(*(train(net, shape) for net in nets), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)
    mine, eager = (net.state_dict() for net in nets)
    assert list(mine) == list(eager)
    for name in mine:
        torch.testing.assert_close(
            mine[name], eager[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    x = torch.randn(shape)
    torch.testing.assert_close(nets[0].eval()(x), nets[1].eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS.values(), ids=PAIRS)
def test_state_dicts_load_both_ways_and_isinstance_holds(ours, theirs, shape):
    mine, eager = ours(4), theirs(4)
    train(eager, shape, 3)
    mine.load_state_dict(eager.state_dict())
    x = torch.randn(shape)
    torch.testing.assert_close(mine.eval()(x), eager.eval()(x), rtol=1e-6, atol=1e-6)
    train(mine.train(), shape, 3)
    eager.load_state_dict(mine.state_dict())
    torch.testing.assert_close(eager.running_var, mine.running_var, rtol=0, atol=0)
    assert isinstance(mine, theirs)


# What torch.nn.BatchNorm is known to get wrong.


@pytest.mark.parametrize("dynamic", [False, True])
def test_momentum_none_compiles_in_one_graph(dynamic):
    layer, eager = bn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3, momentum=None)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for num in (4, 9, 6):
        x = torch.randn(num, 3) + num
        compiled(x)
        eager(x)
    torch.testing.assert_close(layer.running_mean, eager.running_mean)
    torch.testing.assert_close(layer.running_var, eager.running_var)
    assert layer.num_batches_tracked.item() == 3


@pytest.mark.parametrize("poison", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("how", ["eager", "compiled", "masked", "cumulative"])
def test_one_batch_that_is_not_finite_moves_no_statistics(poison, how):
    layer = bn.BatchNorm1d(3, momentum=None if how == "cumulative" else 0.1)
    run = torch.compile(layer, fullgraph=True) if how == "compiled" else layer
    mask = torch.ones(6, dtype=torch.bool) if how == "masked" else None
    run(torch.randn(6, 3), mask=mask)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    bad = torch.randn(6, 3)
    bad[2, 1] = poison
    run(bad, mask=mask)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    run(torch.randn(6, 3), mask=mask)
    assert layer.num_batches_tracked.item() == 2
    assert not torch.equal(layer.running_mean, before["running_mean"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_statistics_of_a_half_precision_module_do_not_stall(dtype):
    # torch's bfloat16 statistics stop at 2.0 where float32 ones reach 4.32.
    layer, float32 = bn.BatchNorm1d(2, momentum=0.001).to(dtype), nn.BatchNorm1d(2, momentum=0.001)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    for _ in range(500):
        x = (torch.randn(16, 2) * 3 + 10).to(dtype)
        assert layer(x).dtype == dtype
        float32(x.float())
    torch.testing.assert_close(layer.running_mean, float32.running_mean, rtol=1e-4, atol=0)
    torch.testing.assert_close(layer.running_var, float32.running_var, rtol=1e-4, atol=0)


def test_casting_to_half_and_back_does_not_round_the_statistics():
    layer = bn.BatchNorm1d(3)
    layer(torch.randn(8, 3) + 0.123456789)
    exact = layer.running_mean.clone()
    layer.half().bfloat16().float()
    assert torch.equal(layer.running_mean, exact)
    assert layer.double().running_mean.dtype == torch.float64
    assert bn.BatchNorm2d(3, dtype=torch.bfloat16).running_var.dtype == torch.float32
    torch_half = nn.BatchNorm1d(3).bfloat16().state_dict()
    layer.load_state_dict(torch_half, assign=True)
    assert layer.running_mean.dtype == torch.float32


def test_a_mask_leaves_padding_out_of_the_statistics():
    layer, plain = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(4, 3, 6)
    mask = torch.tensor([6, 4, 2, 1])[:, None] > torch.arange(6)
    y = layer(x, mask=mask)
    expected = plain(x.movedim(1, -1)[mask])
    torch.testing.assert_close(y.movedim(1, -1)[mask], expected)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_a_mask_of_fewer_than_two_samples_moves_nothing():
    layer = bn.BatchNorm1d(3)
    for shown in (0, 1):
        layer(torch.randn(4, 3), mask=torch.arange(4) < shown)
    assert layer.num_batches_tracked.item() == 0
    assert layer.running_mean.tolist() == [0, 0, 0]


def test_vmap_over_training_mode_counts_the_lanes_as_one_batch():
    layer = bn.BatchNorm1d(3, momentum=1.0)
    x = torch.randn(5, 8, 3) + torch.arange(5)[:, None, None]
    y = torch.vmap(layer)(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 1)))
    torch.testing.assert_close(layer.running_var, x.flatten(0, 1).var(0))
    assert layer.num_batches_tracked.item() == 1
    torch.testing.assert_close(
        y, torch.stack([nn.functional.batch_norm(lane, None, None, training=True) for lane in x])
    )


def test_vmap_over_an_ensemble_gives_each_member_its_own_statistics():
    members = [bn.BatchNorm1d(3, momentum=1.0) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(members)
    x = torch.randn(4, 8, 3)
    torch.vmap(lambda p, b, lane: torch.func.functional_call(members[0], (p, b), (lane,)))(
        parameters, buffers, x
    )
    torch.testing.assert_close(buffers["running_mean"], x.mean(1))
    torch.testing.assert_close(buffers["running_var"], x.var(1))
    assert buffers["num_batches_tracked"].tolist() == [1] * 4


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_moves_statistics_once(reentrant):
    # pytorch #96136: torch's layer moves them in the forward and again in the recomputation.
    layer, once = bn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(6, 3, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(torch.randn_like(y))
    once(x)
    torch.testing.assert_close(layer.running_mean, once.running_mean)
    assert layer.num_batches_tracked.item() == 1


def test_a_frozen_layer_stays_frozen_through_train_save_and_copy():
    layer = bn.BatchNorm1d(3)
    layer(torch.randn(8, 3) * 2 + 1)
    layer.frozen = True
    x = torch.randn(8, 3)
    expected = nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    before = layer.running_mean.clone()
    torch.testing.assert_close(layer.train()(x), expected)
    assert torch.equal(layer.running_mean, before)

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    nn.BatchNorm1d(3).load_state_dict(state)  # torch's layer has nothing unexpected to complain about
    restored = bn.BatchNorm1d(3)
    restored.load_state_dict(state)
    assert restored.frozen
    assert copy.deepcopy(restored).frozen
    assert "frozen" in repr(restored)


# Other behaviour.


def test_features_last_are_asked_for_by_name():
    x = torch.randn(4, 7, 3)
    layer, transposed = bn.BatchNorm1d(3, channel_dim=-1, activation="relu"), nn.BatchNorm1d(3)
    torch.testing.assert_close(layer(x), transposed(x.mT).mT.relu())
    torch.testing.assert_close(layer.running_var, transposed.running_var)
    torch.testing.assert_close(layer.eval()(x), transposed.eval()(x.mT).mT.relu())
    with pytest.raises(ValueError, match=r"3 channels in dimension 1, got shape \(4, 7, 3\).*channel_dim=-1"):
        bn.BatchNorm1d(3)(x)


def test_a_residual_joins_before_the_activation():
    layer, plain = bn.BatchNorm2d(3, activation="leaky_relu"), nn.BatchNorm2d(3)
    x, shortcut = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer(x, shortcut), nn.functional.leaky_relu(plain(x) + shortcut))


def test_an_activation_for_one_call_leaves_the_layer_as_it_is():
    x, shortcut = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    layer, own = bn.BatchNorm2d(3), bn.BatchNorm2d(3, activation="silu")
    assert torch.equal(layer(x, shortcut, activation="silu"), own(x, shortcut))
    assert layer.activation is None
    assert torch.equal(layer(x), bn.BatchNorm2d(3)(x))
    with pytest.raises(ValueError, match=r"activation='silu' and is called with activation='relu'"):
        own(x, activation="relu")
    with pytest.raises(ValueError, match=r"unknown activation 'swish'"):
        layer(x, activation="swish")


def test_per_activation_is_batchnorm1d_of_the_flattened_example():
    layer, flat = bn.BatchNormPerActivation((2, 3, 4), activation="tanh"), nn.BatchNorm1d(24)
    for _ in range(3):
        x = torch.randn(6, 2, 3, 4)
        torch.testing.assert_close(layer(x), flat(x.flatten(1)).view_as(x).tanh())
    assert layer.weight.shape == layer.running_var.shape == (2, 3, 4)
    torch.testing.assert_close(layer.running_var.flatten(), flat.running_var)
    torch.testing.assert_close(layer.eval()(x), flat.eval()(x.flatten(1)).view_as(x).tanh())
    moments = layer.moments(x)
    torch.testing.assert_close(moments.mean, x.double().mean(0))
    assert layer.bfloat16().running_mean.dtype == torch.float32
    with pytest.raises(ValueError, match=r"shape \(N, 2, 3, 4\), got \(6, 2, 4, 3\)"):
        layer(torch.randn(6, 2, 4, 3))


def test_adopting_keeps_every_reference_and_the_numbers():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).bfloat16().float())
    train(net, (6, 4), 3)
    layer, x = net[1], torch.randn(6, 4)
    expected = net.eval()(x)
    assert adopt(layer) is layer is net[1]
    assert type(layer) is bn.BatchNorm1d
    torch.testing.assert_close(net(x), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match="SyncBatchNorm"):
        adopt(nn.SyncBatchNorm(3))


def test_one_node_under_fx_with_residual_and_mask():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = bn.BatchNorm1d(3)

        def forward(self, x, mask):
            return self.norm(x, residual=x, mask=mask, activation="relu") + self.norm(x)

    net = Net().eval()
    traced = torch.fx.symbolic_trace(net)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2
    x, mask = torch.randn(4, 3), torch.tensor([True, False, True, True])
    torch.testing.assert_close(traced(x, mask), net(x, mask))


def test_a_training_step_of_a_model_compiles_in_one_graph():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), bn.BatchNorm2d(4, activation="relu"), bn.BatchNorm2d(4)
    )
    eager, x = copy.deepcopy(net), torch.randn(3, 2, 8, 8)
    compiled = torch.compile(net, fullgraph=True)
    for run in (compiled, eager):
        y = run(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
    torch.testing.assert_close(net[0].weight.grad, eager[0].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net[1].running_var, eager[1].running_var)


def test_exports_in_evaluation_mode():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), bn.BatchNorm2d(4, activation="silu")).eval()
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), net(x))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: bn.BatchNorm1d(3, eps=-1.0), "eps must not be negative, got -1.0"),
        (lambda: bn.BatchNorm2d(3, activation="rleu"), "unknown activation 'rleu'"),
        (lambda: bn.BatchNorm2d(3, channel_dim=2), "channel_dim must be 1 or -1"),
    ],
    ids=["negative eps", "unknown activation", "channel_dim"],
)
def test_wrong_settings_are_refused_when_made(make, says):
    with pytest.raises(ValueError, match=says):
        make()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(4, 3), bn.BatchNorm1d(3))

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (
            torch.randn(1, 4),
            ValueError,
            r"BatchNorm1d\(3\) at 'head.1': .*more than one value per channel.*\(1, 3\)",
        ),
        (torch.randn(2, 4, 4), ValueError, r"at 'head.1': expected input with 3 channels"),
    ],
    ids=["one value a channel", "channels elsewhere"],
)
def test_an_error_names_the_layers_path_in_the_model(x, error, says):
    with pytest.raises(error, match=says):
        Classifier()(x)


@pytest.mark.parametrize(
    ("layer", "x", "error", "says"),
    [
        (
            bn.BatchNorm2d(3),
            torch.randn(2, 4, 5, 5),
            ValueError,
            r"3 channels in dimension 1, got shape \(2, 4, 5, 5\)",
        ),
        (bn.BatchNorm2d(3), torch.randn(2, 3, 5), ValueError, r"4-d \(N, C, H, W\) input, got 3-d"),
        (bn.BatchNorm1d(3), torch.randn(2, 3, 5, 5), ValueError, "2-d or 3-d input, got 4-d"),
        (bn.BatchNorm3d(3), torch.randn(2, 3, 5, 5), ValueError, "5-d"),
        (
            bn.BatchNorm1d(3),
            torch.ones(4, 3, dtype=torch.int32),
            TypeError,
            "floating-point input, got torch.int32",
        ),
        (bn.BatchNorm1d(3), torch.ones(4, 3, dtype=torch.complex64), TypeError, "got torch.complex64"),
    ],
    ids=["channels", "3-d into 2d", "4-d into 1d", "4-d into 3d", "integer", "complex"],
)
def test_bad_input_is_refused_with_the_reason(layer, x, error, says):
    with pytest.raises(error, match=says):
        layer(x)


def test_every_public_layer_is_a_normalization():
    kinds = (bn.BatchNorm1d, bn.BatchNorm2d, bn.BatchNorm3d, bn.BatchNormPerActivation)
    assert all(issubclass(kind, Normalization) for kind in kinds)
