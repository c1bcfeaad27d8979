"""What `accelerate` keeps of a model: flags, ties, methods, copies, and an optimizer's state."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.surgery.agreement import Agreement


def test_flags_ties_and_modes_survive():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.norm = self.alias = nn.BatchNorm1d(4)
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.a(x))) + self.act(self.alias(self.b(x)))

    net = Tied().to(torch.bfloat16)
    net.norm.weight.requires_grad_(False)
    net.a.eval()
    net.act.eval()
    net.a.mark = "kept"
    model, report = bn.accelerate(net, torch.randn(6, 4, dtype=torch.bfloat16))
    assert sum("fused" in c.what for c in report.changes) == 1
    assert model.norm is model.alias
    assert model.a.weight is model.b.weight
    assert model.a.weight is not net.a.weight
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in net.parameters()]
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in net.parameters()]
    assert [m.training for m in model.modules()] == [m.training for m in net.modules()]
    assert model.a.mark == "kept"
    assert model.norm.running_mean.dtype == torch.float32


def test_an_activation_in_its_place_keeps_its_mode():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh().eval()).train(True)
    net[2].eval()
    model, _ = bn.accelerate(net, torch.randn(6, 4))
    assert [m.training for m in model] == [True, True, False]
    assert type(model[2]) is nn.Identity
    assert type(model[1]) is bn.BatchNorm1d
    assert model[1].activation == "tanh"


def test_other_methods_that_call_a_layer_see_it_as_it_was():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.features(x))

        def features(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    net, x = Net(), torch.randn(6, 4)
    model, report = bn.accelerate(net, x)
    assert "fused with silu (silu)" in report.changes[0].what
    torch.testing.assert_close(model(x), net(x))
    torch.testing.assert_close(model.features(x), net.features(x))
    assert (
        "methods of its own that do not go through forward run as before (features)" in report.notes[0].what
    )


def test_no_layer_carries_an_activation_where_a_method_may_want_it_without():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.act = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(self.fc(x)))

        def features(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    net, x = Net(), torch.randn(6, 4)
    model, report = bn.accelerate(net, x)
    torch.testing.assert_close(model.features(x), net.features(x))
    assert type(model.act) is nn.SiLU
    assert "(features)" in report.notes[0].what


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam], ids=["sgd", "adam"]
)
def test_an_optimizer_goes_on_with_its_groups_and_its_state(make):
    # No bias before the normalization: its gradient is rounding, which Adam would blow up.
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    x, cotangent = torch.randn(6, 4).double(), torch.randn(6, 2).double()
    stranger = nn.Parameter(torch.zeros(2))
    groups = [
        {"params": [net[0].weight, net[3].weight], "weight_decay": 0.1},
        {"params": [net[1].weight, net[1].bias, net[3].bias, stranger], "lr": 0.02},
    ]
    optimizer = make(groups)

    def step(model: nn.Module) -> None:
        optimizer.zero_grad()
        model(x).backward(cotangent)
        optimizer.step()

    step(net)
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    model, report = bn.accelerate(net, x)
    report.repoint(optimizer)
    step(model)
    original, optimizer = optimizer, twin_optimizer
    step(twin)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert original.param_groups[1]["params"][-1] is stranger
    assert [g["lr"] for g in original.param_groups] == [g["lr"] for g in twin_optimizer.param_groups]
    assert all(p in set(model.parameters()) for p in original.state if p is not stranger)
    with pytest.raises(ValueError, match="none of the optimizer's parameters belongs to the model"):
        report.repoint(make([nn.Parameter(torch.ones(1))]))


def test_a_second_time_changes_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(6, 4)
    once, _ = bn.accelerate(net, x)
    twice, report = bn.accelerate(once, x)
    assert report.changes == ()
    torch.testing.assert_close(twice(x), net(x))


def test_ours_without_an_activation_is_fused_and_insert_can_come_first():
    plain, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh()), torch.randn(6, 4)
    net, _ = bn.insert(plain, x)
    model, report = bn.accelerate(net, x)
    assert [c.what for c in report.changes] == ["fused with 1 (relu)", "fused with 3 (tanh)"]
    torch.testing.assert_close(model(x), net(x))


def test_copies_and_saved_weights_of_the_result():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.fc(x)) + x)

    net, x = nn.Sequential(Block(), nn.Linear(4, 2)), torch.randn(6, 4)
    model, _ = bn.accelerate(net, x, save_memory=True)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(twin(x), model(x))


def test_a_model_compiles_in_one_graph():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.fc(x)) + x)

    net, x = nn.Sequential(Block(), nn.Linear(4, 2)), torch.randn(6, 4)
    model, _ = bn.accelerate(net, x, save_memory=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for module in (compiled, net):
        module(x).backward(torch.ones(6, 2))
    for a, b in zip(model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


class Wrapped(nn.Module):
    """Layers by name, and a forward that a case brings."""

    def __init__(self, steps) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.act = self.alias = nn.SiLU()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self, self.fc(x))


def only_training_normalizes(net: Wrapped, x: Tensor) -> Tensor:
    if net.training:
        x = net.norm(x)
    return net.act(x)


@pytest.mark.parametrize(
    "steps",
    [
        lambda net, x: net.act(net.norm(x)) * net.norm(x * 2),
        lambda net, x: net.alias(net.norm(x)),
        lambda net, x: net.act(net.norm(x)) * net.alias(x),
        only_training_normalizes,
    ],
    ids=["one call of two", "activation of two names", "both names used", "only training normalizes"],
)
@pytest.mark.parametrize("num_names", [1, 2])
def test_only_the_call_that_is_followed_by_the_activation_gets_it(steps, num_names):
    net, x = Wrapped(steps).double(), torch.randn(6, 4, dtype=torch.float64)
    if num_names == 1:
        net.alias = nn.SiLU()
    model, report = bn.accelerate(net, x)
    refused = steps is only_training_normalizes  # in doubt which step of one mode is that of the other
    assert any("fused" in c.what for c in report.changes) is not refused, str(report)
    assert [a.largest < 1e-12 for a in report.agreement] == [True, True]
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), net.train(mode)(x))


def test_a_part_that_ends_with_a_normalization_does_so_still():
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.SiLU(), nn.Linear(4, 2))
    x = torch.randn(6, 4)
    model, report = bn.accelerate(net, x)
    assert "fused" in report.changes[0].what
    torch.testing.assert_close(model[0](x), net[0](x))
    torch.testing.assert_close(model(x), net(x))


def test_a_block_that_is_followed_from_outside_is_rewritten_there_with_all_that_is_in_it():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.bn1 = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.fc2, self.bn2 = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.act = nn.SiLU()
            self.fc3, self.bn3 = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.fc1(x)))
            return self.bn3(self.fc3(self.act(self.bn2(self.fc2(x)))))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.block(x) + x)

    net, x = Outer(), torch.randn(6, 4)
    model, report = bn.accelerate(net, x)
    assert [("fused" in c.what) for c in report.changes] == [True] * 3
    assert model.forward_source.count("activation = ") == 3
    assert type(model.block) is Block
    torch.testing.assert_close(model.block(x), net.block(x))
    torch.testing.assert_close(model(x), net(x))


def test_an_agreement_that_is_no_number_is_none():
    nan = float("nan")
    assert Agreement("training", 0.0, nan, 0.0, 0.0, 1.0).largest == float("inf")
    assert Agreement("training", 0.0, 0.5, 0.25, 0.0, 1.0).largest == 0.5
