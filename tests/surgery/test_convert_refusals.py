"""`convert` leaves alone what would lose something it does, and says why; and refuses bad input."""

import copy
import re
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm import layers
from batchnorm.surgery import convert, freeze


class Attribute(nn.Module):
    def __init__(self, norm, **given):
        super().__init__()
        self.lin, self.norm, self.given = nn.Linear(4, 4), norm, given

    def forward(self, x):
        return self.norm(self.lin(x), **{k: x if v == "x" else v for k, v in self.given.items()})


class Doubling(nn.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


class OursDoubling(layers.BatchNorm1d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    norm = layers.BatchNorm1d(4, activation="relu")
    norm.register_forward_hook(lambda *_: None)
    return nn.Sequential(norm)


def with_forward():
    norm = nn.BatchNorm1d(4)
    norm.forward = types.MethodType(lambda self, x: 3 * nn.BatchNorm1d.forward(self, x), norm)
    return nn.Sequential(norm)


def frozen():
    model = nn.Sequential(layers.BatchNorm1d(4))
    freeze(model)
    return model


REFUSED = {
    "activation in a module of the user's": (
        lambda: Attribute(layers.BatchNorm1d(4, activation="relu")),
        "torch",
        "it carries relu, .* stands in a Attribute, .* another name in the state dict.* make 'norm'",
    ),
    "activation with a hook": (hooked, "torch", "it has hooks, which would see values before the activation"),
    "activation of the whole model": (
        lambda: layers.BatchNorm1d(4, activation="relu"),
        "torch",
        "is the whole model: put it into an nn.Sequential",
    ),
    "residual": (
        lambda: Attribute(layers.BatchNorm1d(4), residual="x"),
        "torch",
        "called with a residual, a mask",
    ),
    "activation by call": (
        lambda: Attribute(layers.BatchNorm1d(4), activation="relu"),
        "torch",
        "called with a residual, a mask or an activation",
    ),
    "features last": (
        lambda: nn.Sequential(layers.BatchNorm1d(4, channel_dim=-1)),
        "torch",
        r"channel_dim=-1\), and torch.nn's layers have them in dimension 1 only",
    ),
    "per activation": (
        lambda: nn.Sequential(layers.BatchNormPerActivation(4)),
        "torch",
        "γ, β and statistics for every activation",
    ),
    "frozen": (frozen, "torch", "it is frozen, which torch.nn's layers cannot be in training; thaw it first"),
    "subclass of torch's": (
        lambda: nn.Sequential(Doubling(4)),
        "plain",
        "Doubling is a subclass of BatchNorm1d, and what it does beside .* would be lost",
    ),
    "subclass of ours": (
        lambda: nn.Sequential(OursDoubling(4)),
        "torch",
        "OursDoubling is a subclass of BatchNorm1d, and what it does beside .* would be lost",
    ),
    "forward on the object": (with_forward, "plain", "a forward of its own, set on the object"),
}


@pytest.mark.parametrize(("make", "to", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_lost_is_refused_and_stays(make, to, reason):
    model, x = make(), torch.randn(6, 4)
    new, report = convert(model, to, x)
    assert report.changes == ()
    [refusal] = report.refusals
    assert re.search(reason, refusal.reason), refusal.reason
    assert str(new) == str(model)
    assert torch.equal(new(x), model(x))
    assert f"left alone (1)\n  {refusal.where or '(model)'}" in str(report)


def test_peers_row_a_converter_loses_behaviour():
    # torch's SyncBatchNorm converter rebuilt subclasses bare: a fused ReLU was lost (#187298, timm #1254).
    class BatchNormAct(nn.BatchNorm1d):
        def forward(self, x):
            return F.relu(super().forward(x))

    model = nn.Sequential(nn.Linear(4, 4), BatchNormAct(4))
    x = torch.randn(8, 4)
    lost = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    assert lost(x).min() < 0
    for to in ("plain", "torch"):
        kept, report = convert(model, to, x)
        assert kept.eval()(x).min() == 0
        assert [r.where for r in report.refusals] == ["1"]


def test_peers_row_a_converter_unties_a_shared_layer():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(norm, nn.Linear(4, 4), norm)
    torchs_own = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert torchs_own[0] is not torchs_own[2]
    new, _ = convert(model, "plain", torch.randn(5, 4))
    assert new[0] is new[2]
    new(torch.randn(5, 4))
    assert new[0].num_batches_tracked.item() == 2


def small():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


class Positional(nn.Module):
    """Takes the children of a Sequential by position, which an added child moves on."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(layers.BatchNorm1d(4, activation="relu"), nn.Linear(4, 4))

    def forward(self, x):
        return self.body[1](self.body[0](x))


BAD = {
    "unknown kind": (
        lambda: (small(), "batchless"),
        ValueError,
        "to='batchless' .*; there are 'plain', 'torch', 'synced'",
    ),
    "not a module": (lambda: ([small()], "plain"), TypeError, "convert needs a torch.nn.Module, got list"),
    "no batch normalization": (
        lambda: (nn.Linear(3, 3), "plain"),
        ValueError,
        "Linear has no batch normalization to convert",
    ),
    "lazy": (lambda: (nn.LazyBatchNorm1d(), "plain"), ValueError, "run the lazy model once on real data"),
    "wrapped": (lambda: (nn.DataParallel(small()), "plain"), ValueError, "give model.module"),
    "bad example": (lambda: (small(), "plain", torch.randn(2, 2)), ValueError, "fails on the example"),
    "example of a wrong type": (
        lambda: (small(), "plain", "x"),
        TypeError,
        "example must be one input tensor",
    ),
    "computes something else": (
        lambda: (Positional(), "torch", torch.randn(5, 4) - 5),
        RuntimeError,
        "the converted model differs from the original .* except it with except_=",
    ),
}


@pytest.mark.parametrize(("make", "error", "says"), BAD.values(), ids=BAD)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        convert(*make())


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="pattern 'bn' matches no batch normalization; there are: 1"):
        convert(small(), "plain", only="bn")
