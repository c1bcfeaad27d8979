"""Group normalization in the place of batch normalization."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNormPerActivation, convert, freeze
from batchnorm.choosing.group_norm import num_groups, with_group_norm


@pytest.mark.parametrize(
    ("layer", "most", "expected"),
    [
        (nn.BatchNorm2d(64), 32, 32),
        (nn.BatchNorm2d(16), 32, 8),
        (nn.BatchNorm2d(30), 8, 6),
        (nn.BatchNorm3d(7), 32, 1),
        (nn.BatchNorm2d(1), 32, 1),
        (nn.BatchNorm2d(3), 32, 1),
        (nn.BatchNorm1d(256), 32, 16),
        (nn.BatchNorm1d(100), 32, 5),
        (nn.BatchNorm1d(8), 32, 1),
        (BatchNorm1d(64), 2, 2),
    ],
    ids=lambda value: str(value),
)
def test_groups_divide_the_channels_and_are_large_enough(layer, most, expected):
    assert num_groups(layer, most) == expected


def test_the_layer_computes_group_norm_with_its_gamma_and_beta():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    nn.init.normal_(model[1].bias)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    new, count, left = with_group_norm(model, 32)
    h = F.conv2d(x, model[0].weight, model[0].bias)
    grouped = h.view(5, 4, 2 * 16)
    std = (grouped.var(2, unbiased=False, keepdim=True) + 1e-3).sqrt()
    normal = ((grouped - grouped.mean(2, keepdim=True)) / std).view_as(h)
    expected = (normal * model[1].weight.view(-1, 1, 1) + model[1].bias.view(-1, 1, 1)).relu()
    torch.testing.assert_close(new(x), expected)
    torch.testing.assert_close(new.eval()(x), expected)
    assert (count, left) == (1, [])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(model[1]) is nn.BatchNorm2d
    assert new[1].weight is not model[1].weight


def test_shared_layers_stay_shared_and_fused_activations_stay():
    norm = BatchNorm2d(4, activation="relu")
    model = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "plain": nn.BatchNorm2d(4, affine=False)})
    new, count, left = with_group_norm(model, 32)
    assert (count, left) == (2, [])
    assert new["a"] is new["b"][0]
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(new["a"](x), F.group_norm(x, 2, norm.weight, norm.bias, norm.eps).relu())
    assert new["plain"].weight is None
    frozen_gamma = nn.Sequential(nn.BatchNorm2d(4))
    frozen_gamma[0].weight.requires_grad_(False)
    assert not with_group_norm(frozen_gamma, 32)[0][0].weight.requires_grad
    alone, count, _ = with_group_norm(nn.BatchNorm2d(6), 32)
    assert (type(alone), alone.num_groups, count) == (nn.GroupNorm, 3, 1)


class Own(nn.BatchNorm2d):
    """Does something beside."""

    def forward(self, x):
        return super().forward(x).relu()


def hooked() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.register_forward_hook(lambda *args: None)
    return layer


def frozen() -> nn.Module:
    layer = nn.Sequential(BatchNorm2d(4))
    freeze(layer)
    return layer[0]


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (Own(4), "what Own does beside would be lost"),
        (BatchNormPerActivation((4, 2)), "what BatchNormPerActivation does beside would be lost"),
        (hooked(), "it has hooks"),
        (frozen(), "it is frozen"),
    ],
    ids=["a subclass", "per activation", "hooks", "frozen"],
)
def test_what_would_lose_something_is_left_with_the_reason(layer, says):
    model = nn.Sequential(layer, nn.BatchNorm2d(4))
    new, count, left = with_group_norm(model, 32)
    assert count == 1
    assert left == [f"0: {says}"]
    assert type(new[0]) is type(layer)
    assert type(new[1]) is nn.GroupNorm


def test_kinds_of_ours_become_groups_too():
    ghosts, _ = convert(nn.Sequential(nn.BatchNorm2d(8)), "ghost", ghost_size=2)
    new, count, left = with_group_norm(ghosts, 32)
    assert (type(new[0]), new[0].num_groups, count, left) == (nn.GroupNorm, 4, 1, [])
