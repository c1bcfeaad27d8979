"""`parameter_groups`: what decays, by values after steps with gradients of zero."""

import pytest
import torch
from torch import nn

from batchnorm import layers
from batchnorm.surgery import freeze, parameter_groups, thaw


def decays(model, **options):
    """Names of the parameters that shrink by (1 - lr·wd)^N; the others must not move at all."""
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1, **options), lr=0.5, momentum=0.0)
    for _ in range(7):
        optimizer.step()
    found = set()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, before[name]):
            torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.5 * 0.1) ** 7)
            found.add(name)
    return found


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.scale = nn.Parameter(torch.ones(4))
        self.positions = nn.Parameter(torch.ones(1, 3, 4))
        self.bias = nn.Parameter(torch.ones(3, 4))


class RMSNormOfSomebody(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


CASES = {
    "linear": (lambda: nn.Linear(3, 4), {"weight"}),
    "convolution": (lambda: nn.Conv2d(3, 4, 3), {"weight"}),
    "batch norm, torch's": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), {"0.weight"}),
    "batch norm, ours": (lambda: nn.Sequential(nn.Linear(3, 4), layers.BatchNorm1d(4)), {"0.weight"}),
    "per activation: γ of three dimensions": (lambda: layers.BatchNormPerActivation((3, 4, 5)), set()),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), set()),
    "layer norm of two dimensions": (lambda: nn.LayerNorm((3, 4)), set()),
    "group norm": (lambda: nn.GroupNorm(2, 4), set()),
    "RMS norm of two dimensions": (lambda: nn.RMSNorm((3, 4)), set()),
    "somebody's norm": (RMSNormOfSomebody, set()),
    "embedding": (lambda: nn.Embedding(5, 4), {"weight"}),
    "slopes": (lambda: nn.PReLU(4), set()),
    "recurrent": (lambda: nn.LSTM(3, 4), {"weight_ih_l0", "weight_hh_l0"}),
    "attention": (lambda: nn.MultiheadAttention(4, 2), {"in_proj_weight", "out_proj.weight"}),
    "held by a module of the user's": (Custom, {"positions"}),
}


@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES)
def test_only_weights_shrink_by_the_power_of_the_steps(make, expected):
    assert decays(make()) == expected


def test_more_can_be_excepted():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), Custom())
    assert decays(model) == {"0.weight", "1.weight", "2.positions"}
    assert decays(model, except_=["0.*", "*positions"]) == {"1.weight"}


def test_shared_parameters_appear_once():
    embedding, head, norm = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.BatchNorm1d(4)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, norm, norm, head)
    weights, others = (group["params"] for group in parameter_groups(model, 0.1))
    assert [id(p) for p in weights] == [id(embedding.weight)]
    assert [id(p) for p in others] == [id(norm.weight), id(norm.bias)]
    # By either of its names.
    assert parameter_groups(model, 0.1, except_="3.weight")[0]["params"] == []


def test_what_is_a_gamma_in_one_place_does_not_decay():
    norm, custom = nn.LayerNorm((3, 4)), Custom()
    custom.positions = norm.weight
    assert decays(nn.Sequential(custom, norm)) == set()


def test_every_parameter_is_in_one_group_and_frozen_ones_are_kept():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    freeze(model, affine=True)
    model[2].weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert {p for g in groups for p in g["params"]} == set(model.parameters())
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def step():
        optimizer.zero_grad()
        y = model[2](model[1](model[0](torch.randn(4, 3, 8, 8))).mean((2, 3)))
        y.backward(torch.randn_like(y))
        optimizer.step()

    step()
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {"1.weight", "1.bias", "2.weight"}
    thaw(model)
    step()
    assert not torch.equal(model[1].weight, before["1.weight"])


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        lambda groups: torch.optim.AdamW(groups, foreach=True),
        lambda groups: torch.optim.Adagrad(groups),
    ],
    ids=["sgd", "adamw", "adagrad"],
)
def test_an_empty_group_is_no_trouble(make):
    norm = nn.BatchNorm1d(4)
    optimizer = make(parameter_groups(norm, 0.1))
    norm(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups) == 2


BAD = {
    "not a module": (lambda: (list(nn.Linear(2, 2).parameters()), 0.1), TypeError, "Module, got list"),
    "negative": (lambda: (nn.Linear(2, 2), -0.1), ValueError, "zero or more, got -0.1"),
    "not a number": (lambda: (nn.Linear(2, 2), float("nan")), ValueError, "zero or more, got nan"),
    "no parameters": (lambda: (nn.ReLU(), 0.1), ValueError, "ReLU has no parameters to group"),
    "lazy": (lambda: (nn.Sequential(nn.LazyLinear(2)), 0.1), ValueError, "0.weight has no shape yet: run"),
}


@pytest.mark.parametrize(("make", "error", "says"), BAD.values(), ids=BAD)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        parameter_groups(*make())


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ValueError, match="pattern 'embed' matches no parameter; there are: bias, weight"):
        parameter_groups(nn.Linear(2, 2), 0.1, except_="embed")


def test_the_meta_device_is_fine():
    groups = parameter_groups(nn.Linear(2, 2, device="meta"), 0.1)
    assert [len(g["params"]) for g in groups] == [1, 1]
