"""What `accelerate` leaves alone, each with its reason, and what it does not accept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.layers import Normalization


class Net(nn.Module):
    """Two normalizations of one convolution, and whatever a case computes with them."""

    def __init__(self, steps, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act = act or nn.ReLU()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, self.conv(x))


def in_place_between(net: Net, x: Tensor) -> Tensor:
    out = net.bn1(x)
    other = x * 1
    other.add_(1)
    return F.relu(out + other)


def overwrites_the_residual(net: Net, x: Tensor) -> Tensor:
    skip = x * 2
    total = skip
    total += net.bn1(x)
    return F.relu(total) + skip


def called_again_before_the_sum(net: Net, x: Tensor) -> Tensor:
    out = net.bn1(x)
    return F.relu(out + net.bn1(x * 2))


def other_steps_in_evaluation(net: Net, x: Tensor) -> Tensor:
    out = net.bn1(x)
    return net.act(out) if net.training else out


def broadcast(net: Net, x: Tensor) -> Tensor:
    return F.relu(net.bn1(x) + x.mean((2, 3), keepdim=True))


OTHER = "in evaluation other steps follow it than in training, or none that can be traced"
REFUSALS = {
    "another user": (
        Net(lambda net, x: net.act(y := net.bn1(x)) + y),
        {"bn1": "its output is also used by add"},
    ),
    "output of the model too": (
        Net(lambda net, x: (net.act(y := net.bn1(x)), y)),
        {"bn1": "its output is also used by the output of the model"},
    ),
    "activation not carried": (
        Net(lambda net, x: net.act(net.bn1(x)), nn.ReLU6()),
        {"bn1": "act is a relu6, which the layers do not carry (relu, leaky_relu, elu, gelu, "},
    ),
    "hardtanh": (
        Net(lambda net, x: F.hardtanh(net.bn1(x))),
        {"bn1": "hardtanh is a hardtanh, which the layers do not carry"},
    ),
    "slope": (
        Net(lambda net, x: net.act(net.bn1(x)), nn.LeakyReLU(0.2)),
        {"bn1": "act has negative_slope 0.2, where the layers have 0.01"},
    ),
    "slope of a function": (
        Net(lambda net, x: F.leaky_relu(net.bn1(x), negative_slope=0.2)),
        {"bn1": "leaky_relu has negative_slope 0.2, where the layers have 0.01"},
    ),
    "alpha": (
        Net(lambda net, x: F.elu(net.bn1(x), 2.0)),
        {"bn1": "elu has alpha 2.0, where the layers have 1.0"},
    ),
    "alpha of a module": (
        Net(lambda net, x: net.act(net.bn1(x)), nn.ELU(0.5)),
        {"bn1": "act has alpha 0.5, where the layers have 1.0"},
    ),
    "approximate": (
        Net(lambda net, x: net.act(net.bn1(x)), nn.GELU(approximate="tanh")),
        {"bn1": "act has approximate 'tanh', where the layers have 'none'"},
    ),
    "approximate of a function": (
        Net(lambda net, x: F.gelu(net.bn1(x), approximate="tanh")),
        {"bn1": "gelu has approximate 'tanh', where the layers have 'none'"},
    ),
    "class of its own": (
        Net(lambda net, x: net.act(net.bn1(x)), type("Odd", (nn.ReLU,), {"forward": lambda self, x: x})()),
        {"bn1": "act is a Odd, a class of its own"},
    ),
    "broadcast": (
        Net(broadcast),
        {"bn1": "add joins tensors of different shape ((2, 4, 5, 5) and (2, 4, 1, 1))"},
    ),
    "other dtype": (
        Net(lambda net, x: F.relu(net.bn1(x) + x.double())),
        {"bn1": "add joins tensors of different dtype (torch.float32 and torch.float64)"},
    ),
    "weighted sum": (
        Net(lambda net, x: F.relu(torch.add(net.bn1(x), x, alpha=2))),
        {"bn1": "add is not a plain sum of two tensors"},
    ),
    "itself twice": (
        Net(lambda net, x: F.relu((y := net.bn1(x)) + y)),
        {"bn1": "add is not a plain sum of two tensors"},
    ),
    "the sum has another user": (
        Net(lambda net, x: F.relu(y := net.bn1(x) + x) * y),
        {"bn1": "add has other users than the activation"},
    ),
    "in place between": (
        Net(in_place_between),
        {"bn1": "add_ overwrites a tensor between it and add"},
    ),
    "overwrites the residual": (
        Net(overwrites_the_residual),
        {"bn1": "iadd overwrites mul, which may be used elsewhere"},
    ),
    "called again before the sum": (
        Net(called_again_before_the_sum),
        {"bn1": "it is called again before add"},
    ),
    "other steps in evaluation": (Net(other_steps_in_evaluation), {"bn1": OTHER}),
    "both operands": (
        Net(lambda net, x: F.relu(net.bn1(x) + net.bn2(x))),
        {"bn2": "add is taken up by the other operand's normalization"},
    ),
    "a mask": (
        Net(lambda net, x: net.act(net.bn1(x))),
        {"bn1": "it is called with more than its input already (a residual, a mask or an activation)"},
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_not_fused(case):
    net, expected = REFUSALS[case]
    x = torch.randn(2, 3, 5, 5)
    if case == "a mask":
        mask = torch.ones(2, 5, 5, dtype=torch.bool)
        net = Net(lambda net, x: net.act(net.bn1(x, mask=mask)))
        net.bn1 = bn.BatchNorm2d(4)
    model, report = bn.accelerate(net, x, channels_last=False)
    found = {r.where: r.reason for r in report.refusals if "does not reach" not in r.reason}
    assert found.keys() == expected.keys(), str(report)
    for path, reason in expected.items():
        assert found[path].startswith(f"not fused: {reason}")
        assert model.get_submodule(path).activation is None
    assert isinstance(model.bn1, Normalization)
    torch.testing.assert_close(model(x), net(x))


def test_what_is_not_torchs_own_is_not_swapped():
    class Mine(nn.BatchNorm2d):
        pass

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Mine(4), nn.ReLU(), nn.SyncBatchNorm(4)).eval()
    model, report = bn.accelerate(net, torch.randn(2, 3, 5, 5), channels_last=False)
    assert [type(m).__name__ for m in model] == ["Conv2d", "Mine", "ReLU", "SyncBatchNorm"]
    whole = "is neither torch's BatchNorm1d, 2d or 3d itself nor ours, so what it does is not known here"
    assert [(r.where, r.reason) for r in report.refusals] == [
        ("1", f"Mine {whole}"),
        ("3", f"SyncBatchNorm {whole}"),
    ]


HOOKS = {
    "forward": lambda module, calls: module.register_forward_hook(
        lambda m, i, o: calls.append(o.sum().item())
    ),
    "pre": lambda module, calls: module.register_forward_pre_hook(
        lambda m, i: calls.append(i[0].sum().item())
    ),
    "backward": lambda module, calls: module.register_full_backward_hook(
        lambda m, i, o: calls.append(o[0].sum().item())
    ),
    "pre-backward": lambda module, calls: module.register_full_backward_pre_hook(
        lambda m, o: calls.append(o[0].sum().item())
    ),
}


@pytest.mark.parametrize("hooked", ["0.1", "1"], ids=["normalization", "activation"])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_sees_what_it_saw(kind, hooked):
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sigmoid(), nn.Linear(4, 2))
    calls: list[float] = []
    HOOKS[kind](net.get_submodule(hooked), calls)
    x = torch.randn(5, 3)
    model, report = bn.accelerate(net, x)
    assert [(r.where, r.reason) for r in report.refusals] == [
        ("0.1", f"not fused: {hooked} has hooks, which would see other values")
    ]
    calls.clear()
    for module in (net, model):
        module(x).square().sum().backward()
    assert len(calls) == 2
    assert calls[1] == pytest.approx(calls[0], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_module_that_ends_between_the_two(kind):
    net = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Sigmoid())
    calls: list[float] = []
    HOOKS[kind](net[0], calls)
    _, report = bn.accelerate(net, torch.randn(5, 3))
    assert report.refusals[0].reason == "not fused: 0 has hooks, which would see other values"


def test_a_hook_on_a_module_around_stays_and_does_not_hinder():
    class Block(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(super().forward(x))

    net = nn.Sequential(Block(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2))
    calls: list[float] = []
    net[0].register_forward_hook(lambda m, i, o: calls.append(o.min().item()))
    model, report = bn.accelerate(net, torch.randn(5, 3))
    assert "fused" in report.changes[0].what
    calls.clear()
    model(torch.randn(5, 3))
    assert calls == [0.0]


def test_a_hook_on_a_module_that_would_have_to_be_followed():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
            self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), self.inner[1])

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.block(self.inner(x)))

    net = Outer()
    net.block.register_forward_hook(lambda m, i, o: None)
    _, report = bn.accelerate(net, torch.randn(5, 3))
    reasons = {r.where: r.reason for r in report.refusals}
    assert reasons == {"inner.1": "not fused: block has hooks, which would see other values"}


def test_without_an_example_layers_are_swapped_and_nothing_is_fused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model, report = bn.accelerate(net)
    assert [str(c) for c in report.changes] == ["Change(where='1', what='now batchnorm.BatchNorm2d')"]
    assert [r.reason for r in report.refusals] == [
        "nothing is fused without an example, on which to prove what feeds what"
    ]
    assert report.check is None
    assert report.agreement == ()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(x), net(x))
    assert bn.accelerate(nn.Linear(2, 2))[1].refusals == ()


def test_what_cannot_be_called_is_said():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.spare, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.fc(x))
            return x.relu() if x.sum() < 1e9 else x

    _, report = bn.accelerate(Net(), torch.randn(5, 3))
    reasons = {r.where: r.reason for r in report.refusals}
    assert reasons["spare"] == "not fused: the example does not reach it"
    assert reasons["norm"] == "not fused: a forward that cannot be traced calls it"
    assert reasons[""].startswith("its forward cannot be traced (TraceError: ")


def test_a_mistake_is_an_error_and_not_a_model(monkeypatch):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    monkeypatch.setattr(
        "batchnorm.surgery.fusible._kind", lambda trace, node: "silu" if "2" in str(node.target) else None
    )
    with pytest.raises(RuntimeError, match=r"in training the accelerated model differs .* please report"):
        bn.accelerate(net, torch.randn(6, 4))


def test_a_lost_no_grad_is_an_error():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = F.relu(self.norm(self.fc(x)))
            return self.out(x)

    with pytest.raises(RuntimeError, match=r"gradients of inputs .* and of parameters inf"):
        bn.accelerate(Net(), torch.randn(6, 4))


def test_a_model_that_only_evaluates_on_the_example_is_compared_there():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    model, report = bn.accelerate(net, torch.randn(1, 4))
    assert [a.mode for a in report.agreement] == ["evaluation"]
    assert report.notes[0].what.startswith(
        "not compared in training, where the model fails on the example: Value"
    )
    assert not model.training


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"accelerate needs a torch.nn.Module, got int"):
        bn.accelerate(3)
    with pytest.raises(TypeError, match="one input tensor or a tuple"):
        bn.accelerate(nn.Linear(2, 2), [torch.ones(2)])
    with pytest.raises(ValueError, match="fails on the example"):
        bn.accelerate(nn.Linear(2, 2), torch.ones(3, 3))
