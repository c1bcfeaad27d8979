"""`convert`: another kind of layer, the same numbers, and back again; what would be lost is refused."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import layers
from batchnorm.functional import ACTIVATIONS
from batchnorm.statistics import commit_on_step
from batchnorm.surgery import accelerate, convert, freeze, thaw


def settle(model, *shape):
    """Statistics, weights and counters that are not those of the beginning."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) + 0.5) if buffer.is_floating_point() else buffer.fill_(7)
        assert name
    return model


def torchs():
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), nn.ReLU()]
    second = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False, momentum=None)]
    rest = [nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5, track_running_stats=False)]
    return settle(nn.Sequential(*first, *second, *rest))


X = torch.randn(6, 3, 8, 8)


def assert_same_state(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name
        assert got[name].dtype == value.dtype


def test_to_plain_and_back_is_the_model_that_it_was():
    model = torchs().train()
    model[1].weight.requires_grad_(False)
    model[4].eval()
    before = copy.deepcopy(model)
    plain, report = convert(model, "plain", X)
    assert [(c.where, c.what) for c in report.changes] == [
        ("1", "now batchnorm.BatchNorm2d"),
        ("4", "now batchnorm.BatchNorm2d"),
        ("7", "now batchnorm.BatchNorm1d"),
    ]
    assert report.refusals == report.notes == ()
    assert [a.mode for a in report.agreement] == ["training", "evaluation"]
    assert all(a.largest <= 1e-9 for a in report.agreement)
    assert_same_state(plain, model)
    back, _ = convert(plain, "torch", X)
    for was, now in zip(before.modules(), back.modules(), strict=True):
        assert type(was) is type(now)
        assert was.__dict__.keys() == now.__dict__.keys()
        assert was.training == now.training
        for (_, p), (_, q) in zip(was.named_parameters(), now.named_parameters(), strict=True):
            assert p.requires_grad == q.requires_grad
    assert_same_state(back, before)
    for x in (X, X * 2):
        assert torch.equal(back(x), before(x))
    assert_same_state(back, before)


def test_the_given_model_is_untouched():
    model = torchs()
    before, objects = copy.deepcopy(model), dict(model.named_modules())
    new, _ = convert(model, "plain", X)
    assert all(
        objects[name] is m and type(m) is type(before.get_submodule(name))
        for name, m in model.named_modules()
    )
    assert_same_state(model, before)
    with torch.no_grad():
        new[1].weight.add_(1)
        new[1].running_mean.add_(1)
    assert_same_state(model, before)


def test_hooks_shared_layers_and_attributes_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.again = self.norm
            self.shortcut = [self.norm]

        def forward(self, x):
            return self.again(self.norm(x).relu() + 1)

    model, calls = Net(), []
    model.norm.register_forward_hook(lambda *_: calls.append(1))
    model.norm.note = "the user's"
    new, report = convert(model, "plain")
    assert new.norm is new.again is new.shortcut[0]
    assert new.norm is not model.norm
    assert new.norm.note == "the user's"
    new(torch.randn(3, 4))
    assert len(calls) == 2
    assert [c.where for c in report.changes] == ["norm"]
    assert [n.what for n in report.notes] == ["not compared with the original: no example was given"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.Adagrad(p),
    ],
    ids=["sgd", "adam", "adagrad"],
)
def test_an_optimizer_goes_on_with_its_state_bit_for_bit(make):
    model = torchs()
    optimizer = make(
        [{"params": [*model[:3].parameters()], "lr": 0.03}, {"params": [*model[3:].parameters()]}]
    )
    y = model(X)
    y.backward(torch.randn_like(y))
    optimizer.step()
    names = {id(p): name for name, p in model.named_parameters()}
    before = {
        (names[id(p)], key): value.clone() if isinstance(value, torch.Tensor) else value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    new, report = convert(model, "plain", X)
    report.repoint(optimizer)
    names = {id(p): name for name, p in new.named_parameters()}
    after = {
        (names[id(p)], key): value for p, state in optimizer.state.items() for key, value in state.items()
    }
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(torch.as_tensor(after[key]), torch.as_tensor(value)), key
    assert optimizer.param_groups[0]["lr"] == 0.03
    was = new[0].weight.clone()
    optimizer.zero_grad()
    y = new(X)
    y.backward(torch.randn_like(y))
    optimizer.step()
    assert not torch.equal(new[0].weight, was)


# An activation that a layer carries.


def carrying():
    inner = nn.Sequential(nn.Linear(4, 4, bias=False), layers.BatchNorm1d(4, activation="silu"))
    return settle(
        nn.Sequential(nn.Linear(4, 4), layers.BatchNorm1d(4, activation="relu"), inner, nn.Linear(4, 2))
    )


def test_a_carried_activation_becomes_a_child_and_is_carried_again():
    model, x = carrying(), torch.randn(6, 4)
    theirs, report = convert(model, "torch", x)
    assert [c.what for c in report.changes] == [
        "now torch.nn.BatchNorm1d; relu is a new child behind it, 1_relu, and those after it move on",
        "now torch.nn.BatchNorm1d; silu is a new child behind it, 1_silu, and those after it move on",
    ]
    assert [type(m) for m in theirs] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Sequential, nn.Linear]
    assert [name for name, _ in theirs.named_children()] == ["0", "1", "1_relu", "2", "3"]
    assert_same_state(theirs, model)
    assert theirs.eval()(x).isfinite().all()
    torch.testing.assert_close(theirs(x), copy.deepcopy(model).eval()(x))
    back, report = convert(theirs, "plain", x)
    assert [c.what for c in report.changes] == [
        "now batchnorm.BatchNorm1d; carries relu again",
        "now batchnorm.BatchNorm1d; carries silu again",
    ]
    assert str(back) == str(model)
    assert_same_state(back, model)
    assert torch.equal(back.train()(x), model.train()(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_becomes_torchs_module(name):
    model, x = nn.Sequential(layers.BatchNorm1d(4, activation=name)), torch.randn(8, 4) * 3
    new, report = convert(model, "torch", x)
    assert type(new[1]).__module__.startswith("torch.nn.")
    assert report.check <= 1e-9
    assert convert(new, "plain", x)[0][0].activation == name


def test_what_accelerate_fused_in_a_sequential_comes_apart_again():
    model, x = torchs(), X
    fast, _ = accelerate(model, x, channels_last=False, keep_memory=False)
    assert type(fast[2]) is nn.Identity
    back, report = convert(fast, "torch", x)
    assert report.changes[0].what == "now torch.nn.BatchNorm2d; relu in the nn.Identity's place"
    assert str(back) == str(model)
    assert torch.equal(back(x), model(x))
    again, _ = convert(back, "plain", x)
    assert str(again) == str(fast)


def test_a_layer_shared_by_two_sequentials_gets_its_activation_behind_both():
    norm = layers.BatchNorm1d(4, activation="relu")
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), norm), nn.Linear(4, 4), norm)
    new, _ = convert(model, "torch", torch.randn(5, 4))
    assert new[0][1] is new[2]
    assert type(new[0][2]) is type(new[3]) is nn.ReLU
    assert str(convert(new, "plain")[0]) == str(model)


# Other things.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_goes_there_and_back(dtype):
    model = settle(nn.Sequential(nn.BatchNorm1d(4))).to(dtype)
    plain, _ = convert(model, "plain")
    assert plain[0].running_var.dtype == torch.float32
    back, report = convert(plain, "torch")
    assert_same_state(back, model)
    name = str(dtype).removeprefix("torch.")
    assert report.changes[0].what.endswith(f"statistics rounded to {name}, as torch's kernels need them")
    back(torch.randn(5, 4).to(dtype))


def test_a_frozen_layer_of_torchs_converted_to_plain_stays_ours_when_thawed():
    model = nn.Sequential(nn.BatchNorm1d(4))
    freeze(model)
    new, report = convert(model, "plain")
    assert new[0].frozen
    assert report.changes[0].what.endswith("stays so when it is thawed or its handle removed")
    thaw(new)
    assert type(new[0]) is layers.BatchNorm1d
    thaw(model)
    assert type(model[0]) is nn.BatchNorm1d


def test_patterns_choose_and_a_second_time_changes_nothing():
    model = torchs()
    new, report = convert(model, "plain", only=["1", "4"], except_="4")
    assert [type(new[i]) for i in (1, 4)] == [layers.BatchNorm2d, nn.BatchNorm2d]
    assert {r.where: r.reason for r in report.refusals} == {
        "4": "excluded by except_='4'",
        "7": "excluded: no pattern of only= matches",
    }
    whole, _ = convert(new, "plain")
    again, report = convert(whole, "plain", X)
    assert report.changes == report.refusals == ()
    assert str(again) == str(whole)


def test_meta_models_convert_without_an_example():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    new, _ = convert(model, "plain")
    assert new[1].running_mean.device.type == "meta"


def test_a_converted_copy_of_a_model_with_a_handle_has_none():
    model = torchs()
    handle = commit_on_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    plain, _ = convert(model, "plain", X)
    theirs, _ = convert(model, "torch", X)
    handle.remove()
    assert type(plain[1]) is layers.BatchNorm2d
    assert type(theirs[1]) is type(model[1]) is nn.BatchNorm2d
    plain(X)
    assert plain[1].num_batches_tracked.item() == 8
