"""What a trace shows: calls, positions, modes and arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.surgery.graph import Untraceable, is_leaf, is_normalization
from batchnorm.surgery.models import skeleton
from batchnorm.surgery.tracer import trace


class Inner(nn.Module):
    scale = 3

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, bias=None):
        y = F.relu(self.fc(x)) * self.scale
        return y if bias is None else y + bias


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.inner(self.inner(x), bias=x)


def test_calls_are_told_apart():
    model = Outer()
    traced, inputs = trace(model, (torch.randn(2, 4),), training=True)
    assert [(c.path, c.position) for c in traced.calls] == [
        ("", 0),
        ("inner", 0),
        ("inner.fc", 0),
        ("inner", 1),
        ("inner.fc", 0),
    ]
    assert traced.times("inner") == 2
    relus = [node for node in traced.graph.nodes if node.target is F.relu]
    assert relus[0].meta["call"] is not relus[1].meta["call"]
    assert [node.meta["key"] for node in relus] == [((0,), 0), ((1,), 0)]
    traced.measure(inputs)
    assert relus[0].meta["shape"] == (2, 4)
    assert traced.attributes == {"inner.scale", "seen"}


def test_tracing_leaves_no_trace_in_the_model():
    model = Outer().eval()
    trace(model, (torch.randn(2, 4),), training=True)
    assert model.seen == []
    assert type(model.inner) is Inner
    assert not model.training


def test_prefix_and_inlining():
    traced, _ = trace(Outer(), (torch.randn(2, 4),), training=False, prefix="a.b", inline=())
    assert [c.path for c in traced.calls] == ["a.b", "a.b.inner", "a.b.inner"]
    assert traced.module(next(n for n in traced.graph.nodes if n.op == "call_module")).scale == 3


def test_reason_is_a_phrase():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(Untraceable, match=r"^TraceError: symbolically traced variables cannot be used"):
        trace(Branching(), (torch.randn(2),), training=False)


@pytest.mark.parametrize(
    ("module", "leaf", "normalizes"),
    [
        (nn.Linear(2, 2), True, False),
        (nn.Sequential(nn.Linear(2, 2)), False, False),
        (nn.BatchNorm1d(2), True, True),
        (nn.InstanceNorm1d(2), True, True),
        (type("LayerNorm2d", (nn.Module,), {})(), True, True),
        (type("ConvNorm", (nn.Sequential,), {})(nn.Linear(2, 2), nn.BatchNorm1d(2)), False, False),
        (type("Gate", (nn.ReLU,), {})(), True, False),
        (type("Block", (nn.Module,), {})(), False, False),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_leaves_and_normalizations(module, leaf, normalizes):
    assert is_leaf(module) == leaf
    assert is_normalization(module) == normalizes


def test_skeleton_shares_parameters_and_copies_buffers():
    model = nn.BatchNorm1d(3)
    twin = skeleton(model)
    assert twin.weight is model.weight
    assert twin.running_mean is not model.running_mean
    assert skeleton(nn.Sequential(model, model))[1] is not model
