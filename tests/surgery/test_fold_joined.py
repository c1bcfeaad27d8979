"""`fold` of layers that are told a residual, an activation or a mask when they are called."""

import normalized_networks
import pytest
import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.layers import Joined

IMAGES = (2, 3, 7, 7)
MASK = torch.ones(2, 5, 5, dtype=torch.bool)


class Net(nn.Module):
    def __init__(self, options, **settings) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, **settings)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.running_mean)
        nn.init.normal_(self.norm.weight)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y, **self.options(x, y))


def shortcut(x: Tensor) -> Tensor:
    return x[:, :1, 1:-1, 1:-1].expand(-1, 4, -1, -1)


@pytest.mark.parametrize(
    ("options", "settings", "left"),
    [
        (lambda x, y: {"residual": shortcut(x)}, {}, "Joined()"),
        (lambda x, y: {"residual": shortcut(x)}, {"activation": "silu"}, "Joined(activation='silu')"),
        (lambda x, y: {"residual": shortcut(x), "activation": "relu"}, {}, "Joined()"),
        (lambda x, y: {"activation": "tanh"}, {}, "Joined()"),
    ],
    ids=["residual", "residual, carried activation", "residual and activation", "activation"],
)
def test_what_a_call_asks_for_beside_the_normalization_stays(options, settings, left):
    model, x = Net(options, **settings).double().eval(), torch.randn(IMAGES, dtype=torch.float64)
    new, proof = bn.fold(model, x)
    assert [c.where for c in proof.changes] == ["norm"]
    assert repr(new.norm) == left
    torch.testing.assert_close(new(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (lambda x, y: {"mask": MASK}, "it is called with a mask"),
        (lambda x, y: {"residual": y}, "its input is its residual too"),
    ],
    ids=["mask", "input as residual"],
)
def test_refused(options, reason):
    new, proof = bn.fold(Net(options).eval(), torch.randn(IMAGES))
    assert proof.changes == ()
    assert [(r.where, r.reason) for r in proof.refusals] == [("norm", reason)]
    assert isinstance(new.norm, bn.BatchNorm2d)


def test_an_accelerated_residual_network_is_folded_whole():
    model, x = normalized_networks.ResNet().double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for _ in range(3):
        model(torch.randn_like(x))
    fast, _ = bn.accelerate(model, x)
    new, proof = bn.fold(fast.eval(), x)
    assert len(proof.folds) == 8
    assert proof.refusals == ()
    torch.testing.assert_close(new(x), model.eval()(x), rtol=1e-10, atol=1e-12)


def test_joined_by_itself():
    x, z = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(Joined("relu")(x, z), (x + z).relu())
    torch.testing.assert_close(Joined()(x, activation="tanh"), x.tanh())
    assert Joined()(x) is x
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        Joined("swish")
