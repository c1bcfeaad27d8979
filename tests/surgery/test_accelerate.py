"""`accelerate` on networks of many families: the same numbers before and after, and what was fused."""

import copy

import normalized_networks as networks
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm as bn
from batchnorm.layers import Normalization


def built(make, shape) -> tuple[nn.Module, Tensor]:
    """A network in float64, where only a mistake makes a difference, with statistics that say something."""
    net = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    net(x)
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_()
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0.5)
    return net, x


def tensors(output) -> list[Tensor]:
    return list(output) if isinstance(output, tuple) else [output]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, shape, num_steps: int) -> list[Tensor]:
    """All outputs and gradients of a few steps, on the same random inputs and losses at every call."""
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(num_steps):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        optimizer.zero_grad()
        torch.manual_seed(2)
        outputs = tensors(net(x))
        loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
        loss.backward()
        optimizer.step()
        seen += [*outputs, x.grad, *(p.grad.clone() for p in net.parameters())]
    return seen


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)


def assert_same(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("save_memory", [False, True], ids=["plain", "save_memory"])
@pytest.mark.parametrize(
    ("make", "shape", "fused", "swapped"), networks.NETWORKS.values(), ids=networks.NETWORKS
)
def test_three_steps_equal_those_of_the_original(make, shape, fused, swapped, save_memory):
    net, x = built(make, shape)
    before = copy.deepcopy(net.state_dict())
    model, report = bn.accelerate(net, x, save_memory=save_memory)

    whats = [change.what for change in report.changes]
    assert sum("fused" in what for what in whats) == fused, str(report)
    assert sum("fused" not in what for what in whats) == swapped, str(report)
    assert [a.mode for a in report.agreement] == ["training", "evaluation"]
    assert max(a.largest for a in report.agreement) < 1e-11
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert all(isinstance(m, Normalization) for m in norms)

    # The original: neither its class, its layers, its values nor its mode.
    assert type(net) is (make if isinstance(make, type) else nn.Sequential)
    assert all(not isinstance(m, Normalization) for m in net.modules())
    assert_same(net.state_dict().values(), before.values())
    assert net.training

    assert isinstance(model, type(net))
    assert_same(train(model, sgd(model), shape, 3), train(net, sgd(net), shape, 3))
    assert list(model.state_dict()) == list(net.state_dict())
    assert_same(model.state_dict().values(), net.state_dict().values())
    assert_same(tensors(model.eval()(x)), tensors(net.eval()(x)))


@pytest.mark.parametrize(
    ("make", "shape", "fused", "swapped"), networks.NETWORKS.values(), ids=networks.NETWORKS
)
def test_checkpoints_load_strictly_both_ways(make, shape, fused, swapped):
    net, x = built(make, shape)
    model, _ = bn.accelerate(net, x, channels_last=True)
    trained, _ = built(make, shape)
    for source, target in ((trained, model), (model, make().double().eval())):
        source.eval(), target.eval()
        target(x)
        target.load_state_dict(source.state_dict(), strict=True)
        assert_same(tensors(target(x)), tensors(source(x)))
