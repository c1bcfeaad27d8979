"""`insert` on networks written in many ways: exact reports, the same function before, learning after."""

import copy

import insertion_networks as networks
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.surgery import insert
from batchnorm.surgery.models import outputs

TRACED = "the forward of {} now runs a traced graph; class, attributes and methods are kept"
TWICE = (
    "called 2 times by a forward that cannot be traced: its calls differ in their statistics and cannot be "
    "told apart"
)
UNTRACEABLE = (
    "its forward cannot be traced (TraceError: symbolically traced variables cannot be used as inputs to "
    "control flow); what it calls itself is left alone"
)

# For each network: layers by path, affine layers that lose their bias, refusals, notes.
CASES = {
    "sequential mlp": (
        networks.plain_mlp,
        {"1_bn": "BatchNorm1d(32) on 0, before 1", "3_bn": "BatchNorm1d(32) on 2, before 3"},
        ["0", "2"],
        {},
        {},
    ),
    "modules in a forward of its own": (
        networks.WithModules,
        {
            "relu1.bn": "BatchNorm2d(8) on conv1, before relu1",
            "relu2.bn": "BatchNorm2d(16) on conv2, before relu2",
        },
        ["conv1", "conv2"],
        {},
        {},
    ),
    "functions and methods": (
        networks.Functional,
        {
            "fc1_bn": "BatchNorm1d(32) on fc1, before relu",
            "fc2_bn": "BatchNorm1d(32) on fc2, before sigmoid",
            "fc3_bn": "BatchNorm1d(32) on fc3, before tanh",
        },
        ["fc1", "fc2", "fc3"],
        {},
        {
            "": TRACED.format("Functional")
            + "; what it read from temperature is fixed at today's values; methods "
            "of its own that do not go through forward run as before (predict)"
        },
    ),
    "residuals without norm": (
        networks.Residual,
        {
            "stem.1_bn": "BatchNorm2d(8) on stem.0, before stem.1",
            "layers.0.conv1_bn": "BatchNorm2d(8) on layers.0.conv1, before layers.0.relu",
            "layers.0.conv2_bn": "BatchNorm2d(8) on layers.0.conv2, before the add, for layers.0.relu",
            "layers.1.conv1_bn": "BatchNorm2d(12) on layers.1.conv1, before layers.1.relu",
            "layers.1.conv2_bn": "BatchNorm2d(12) on layers.1.conv2, before the add, for layers.1.relu",
            "layers.1.downsample_bn": "BatchNorm2d(12) on layers.1.downsample, before the add, "
            "for layers.1.relu",
        },
        [
            "stem.0",
            "layers.0.conv1",
            "layers.0.conv2",
            "layers.1.downsample",
            "layers.1.conv1",
            "layers.1.conv2",
        ],
        {},
        {"layers.0": TRACED.format("Block"), "layers.1": TRACED.format("Block")},
    ),
    "one relu for all": (
        networks.SharedActivation,
        {f"layers_{i}_bn": f"BatchNorm1d(32) on layers.{i}, before act" for i in range(3)},
        ["layers.0", "layers.1", "layers.2"],
        {},
        {"": TRACED.format("SharedActivation")},
    ),
    "a block called twice": (
        networks.SharedBlock,
        {
            "block_fc_bn": "BatchNorm1d(32) on block.fc, before block.act",
            "block_fc_bn_2": "BatchNorm1d(32) on block.fc, before block.act",
        },
        ["block.fc"],
        {},
        {"": TRACED.format("SharedBlock")},
    ),
    "features last": (
        networks.Mixer,
        {
            f"blocks.{i}.{name}_bn": f"BatchNorm1d({width}, channel_dim=-1) on blocks.{i}.{name}, "
            f"before gelu in blocks.{i}"
            for i in range(2)
            for name, width in (("up", 24), ("tokens", 8))
        },
        ["blocks.0.up", "blocks.0.tokens", "blocks.1.up", "blocks.1.tokens"],
        {},
        {"blocks.0": TRACED.format("MixerBlock"), "blocks.1": TRACED.format("MixerBlock")},
    ),
    "untraceable with traceable pieces": (
        networks.Dynamic,
        {
            "body.1_bn": "BatchNorm1d(32) on body.0, before body.1",
            "body.3_bn": "BatchNorm1d(32) on body.2, before body.3",
            "head.1_bn": "BatchNorm1d(16) on head.0, before head.1",
        },
        ["body.0", "body.2", "head.0"],
        {
            "": UNTRACEABLE,
            "loop": TWICE,
            "loop.act": "it runs inside a forward that cannot be traced",
            "act": "it runs inside a forward that cannot be traced",
        },
        {},
    ),
    "nested sequentials, dropout between": (
        networks.nested,
        {"1.1.1_bn": "BatchNorm2d(8) on 1.0, before 1.1.1", "3.1_bn": "BatchNorm1d(32) on 3.0, before 3.1"},
        ["3.0"],
        {"1.0.bias": "kept: its output goes into 1.1.0 as it is"},
        {},
    ),
    "partly normalized": (
        networks.PartlyNormalized,
        {"b.1_bn": "BatchNorm1d(32) on b.0, before b.1"},
        ["b.0"],
        {
            "a.2": "already normalized by a.1",
            "sigmoid": "no affine layer before it: its input comes from mean",
        },
        {},
    ),
    "transposed convolution": (
        networks.Decoder,
        {
            "down.1_bn": "BatchNorm2d(6) on down.0, before down.1",
            "act.bn": "BatchNorm2d(8) on up, before act",
        },
        ["down.0", "up"],
        {},
        {},
    ),
    "branches and a silu by hand": (
        networks.Branches,
        {
            "left_bn": "BatchNorm1d(16) on left, before the cat, for relu",
            "right_bn": "BatchNorm1d(16) on right, before the cat, for relu",
            "swish.bn": "BatchNorm1d(36) on fc, before the product x·g(x), for sigmoid in swish",
        },
        ["left", "right", "fc"],
        {},
        {"": TRACED.format("Branches")},
    ),
    "conv1d": (networks.conv1d, {"2_bn": "BatchNorm1d(12) on 1, before 2"}, ["1"], {}, {}),
    "conv3d": (networks.conv3d, {"2_bn": "BatchNorm3d(6) on 1, before 2"}, ["1"], {}, {}),
}


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return torch.tensor(data.data / 16 - 0.5, dtype=torch.float32), torch.tensor(data.target)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


def test_report_names_every_change_and_refusal(case):
    make, layers, dropped, refused, notes = case
    _, report = insert(make(), torch.randn(16, 64))
    removed = {
        f"{path}.bias": "removed: the normalization subtracts it, β takes its role" for path in dropped
    }
    assert {change.where: change.what for change in report.changes} == layers | removed
    assert {refusal.where: refusal.reason for refusal in report.refusals} == refused
    assert {note.where: note.what for note in report.notes} == notes
    assert report.check < 1e-13


def test_layers_are_where_the_report_says_and_nothing_else_is_new(case):
    make, layers, dropped, _, _ = case
    model = make()
    new, _ = insert(model, torch.randn(16, 64))
    kinds = {"BatchNorm1d": BatchNorm1d, "BatchNorm2d": BatchNorm2d, "BatchNorm3d": BatchNorm3d}
    for path, what in layers.items():
        layer = new.get_submodule(path)
        assert type(layer) is kinds[what.split("(")[0]]
        assert layer.channel_dim == (-1 if "channel_dim=-1" in what else 1)
    of_layers = tuple(f"{path}." for path in layers)
    kept = {name for name in new.state_dict() if not name.startswith(of_layers)}
    assert kept == set(model.state_dict()) - {f"{path}.bias" for path in dropped}
    assert isinstance(new, type(model))


def test_original_is_untouched(case):
    model = case[0]()
    model.train()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    insert(model, torch.randn(16, 64))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert before.keys() == model.state_dict().keys()
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == classes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_new_layers_see_what_each_affine_layer_gives(case):
    """In training, what each nonlinearity gets has mean zero in every channel."""
    make, layers, _, _, _ = case
    new, _ = insert(make(), torch.randn(16, 64))
    seen = {}
    for path in layers:
        # A copy: nonlinearities in place overwrite what they see.
        new.get_submodule(path).register_forward_hook(
            lambda m, a, y, path=path: seen.update({path: y.detach().clone()}) or None
        )
    torch.manual_seed(1)
    new.train()(torch.randn(64, 64))
    assert seen.keys() == layers.keys()
    for path, y in seen.items():
        dims = [d for d in range(y.dim()) if d != new.get_submodule(path).channel_dim % y.dim()]
        torch.testing.assert_close(y.mean(dims), torch.zeros(y.mean(dims).shape), atol=1e-5, rtol=0)


def test_model_learns(case, digits):
    images, labels = digits
    torch.manual_seed(0)
    model, _ = insert(case[0](), images[:16])
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for step in range(30):
        batch = torch.arange(step * 59, step * 59 + 128) % len(images)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.99 * sum(losses[:5])
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    # The dynamic network's spare loop aside, everything learns.
    assert missing == []


def test_copies_and_state_dicts_of_a_rewritten_model_work():
    new, _ = insert(networks.Functional(), torch.randn(16, 64))
    new.train()(torch.randn(32, 64))
    other, _ = insert(networks.Functional(), torch.randn(16, 64))
    other.load_state_dict(new.state_dict())
    x = torch.randn(5, 64)
    expected = new.eval()(x)
    assert torch.equal(other.eval()(x), expected)
    assert torch.equal(copy.deepcopy(new)(x), expected)
    assert torch.equal(new.predict(x), expected.argmax(1))


def test_rewritten_forward_asks_for_the_mode():
    new, _ = insert(networks.Functional(), torch.randn(16, 64))
    x = torch.randn(32, 64)
    new.eval()
    assert torch.equal(new(x), new(x))
    for module in new.modules():
        if isinstance(module, BatchNorm1d):
            module.frozen = True
    new.train()
    torch.manual_seed(1)
    first = new(x)
    assert not torch.equal(first, new(x)), "dropout must be active in training"


def test_rewritten_model_compiles_without_graph_breaks():
    new, _ = insert(networks.Residual(), torch.randn(4, 64))
    x = torch.randn(4, 64)
    compiled = torch.compile(copy.deepcopy(new).eval(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), new.eval()(x))


def test_channels_last_input_and_weights():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    new, report = insert(model, x)
    assert [change.where for change in report.changes] == ["1_bn", "0.bias"]
    assert new(x).is_contiguous(memory_format=torch.channels_last)


def test_statistics_of_a_shared_block_are_of_each_call():
    model = networks.SharedBlock()
    new, _ = insert(model, torch.randn(16, 64))
    for layer in (new.block_fc_bn, new.block_fc_bn_2):
        layer.momentum = 1.0
    x = torch.randn(256, 64) * 3
    new.train()(x)
    with torch.no_grad():
        first = F.linear(new.inp(x), new.block.fc.weight)
        torch.testing.assert_close(new.block_fc_bn.running_mean, first.mean(0))
        torch.testing.assert_close(new.block_fc_bn.running_var, first.var(0), rtol=1e-4, atol=1e-5)
        standardized = (first - first.mean(0)) / (first.var(0, correction=0) + 1e-5).sqrt()
        second = F.linear(standardized.tanh(), new.block.fc.weight)
        torch.testing.assert_close(new.block_fc_bn_2.running_mean, second.mean(0), rtol=1e-4, atol=1e-5)


def test_outputs_repeat_in_spite_of_noise_in_forward():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    x = torch.randn(3, 2)
    assert torch.equal(outputs(Noisy(), (x,))[0], outputs(Noisy(), (x,))[0])
