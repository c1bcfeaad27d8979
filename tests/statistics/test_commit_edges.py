"""`commit_on_step` beside freezing, compiling and copying; what it gives back; what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

from batchnorm import layers
from batchnorm.layers import pending
from batchnorm.statistics import commit_on_step
from batchnorm.surgery import accelerate, freeze, thaw


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3), layers.BatchNorm1d(3)
    )


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


def learn(model, x):
    y = model(x)
    y.backward(torch.randn_like(y))


def everything(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def assert_same(layer, before):
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


X = torch.randn(16, 4)


# What it gives back.


def test_removing_restores_classes_flags_and_hooks_and_drops_what_waits():
    model = network()
    model[1].register_forward_hook(lambda *_: None)
    untouched, objects = copy.deepcopy(model), dict(model.named_modules())
    optimizer = sgd(model)
    handle = commit_on_step(model, optimizer)
    assert isinstance(model[1], nn.BatchNorm1d)
    assert list(model.state_dict()) == list(untouched.state_dict())
    learn(model, X)
    handle.remove()
    handle.remove()
    assert all(objects[name] is module for name, module in model.named_modules())
    for was, now in zip(untouched.modules(), model.modules(), strict=True):
        assert type(was) is type(now)
        assert was.__dict__.keys() == now.__dict__.keys()
        assert was._forward_hooks.keys() == now._forward_hooks.keys()
        assert not any(p._backward_hooks for p in now.parameters())
    assert not optimizer._optimizer_step_post_hooks
    assert_same(model, everything(untouched))
    assert handle.dropped == {"1": 1, "4": 1}
    model(X)
    assert model[1].num_batches_tracked.item() == 1


def test_as_a_context_it_ends_with_an_error_too():
    model = network()

    def fail(*_):
        raise ZeroDivisionError

    model[4].register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), commit_on_step(model, sgd(model)):
        model(X)
    assert type(model[1]) is nn.BatchNorm1d
    assert model[4].pending is None


def test_what_waits_can_be_committed_or_dropped_by_hand():
    model = network()
    handle = commit_on_step(model, sgd(model))
    before = everything(model)
    model(X)
    handle.drop()
    handle.commit()
    assert_same(model, before)
    model(X)
    handle.commit()
    assert model[1].num_batches_tracked.item() == 1
    assert handle.moves == {"1": 1, "4": 1}


def test_accumulating_over_a_copy_of_the_model_changes_nothing_for_the_original():
    model = network()
    optimizer = sgd(model)
    handle = commit_on_step(model, optimizer)
    model(torch.randn(6, 4))
    twin = copy.deepcopy(model)
    assert twin[1].pending is None
    twin(torch.randn(6, 4))  # moves at once: no handle of its own
    assert twin[1].num_batches_tracked.item() == 1
    assert handle.waiting == {"1": 1, "4": 1}


def test_a_pickled_model_has_no_handle():
    model = network()
    commit_on_step(model, sgd(model))
    model(X)
    twin = pickle.loads(pickle.dumps(model))
    assert twin[1].pending is twin[4].pending is None
    twin(X)
    assert twin[4].num_batches_tracked.item() == 1


# Freezing.


def test_frozen_layers_are_left_alone_as_long_as_they_are_frozen():
    model = network()
    freeze(model, only="1")
    optimizer = sgd(model)
    handle = commit_on_step(model, optimizer)
    before = everything(model[1])
    learn(model, X)
    optimizer.step()
    assert_same(model[1], before)
    assert handle.moves == {"1": 0, "4": 1}
    thaw(model)
    learn(model, X)
    optimizer.step()
    assert handle.moves == {"1": 1, "4": 2}


def test_a_freeze_between_forward_and_step_holds_at_once():
    model = network()
    optimizer = sgd(model)
    handle = commit_on_step(model, optimizer)
    before = everything(model)
    learn(model, X)
    freeze(model)
    optimizer.step()
    assert_same(model, before)
    assert handle.dropped == {"1": 1, "4": 1}


@pytest.mark.parametrize("first", ["thaw", "remove"])
def test_freeze_and_handle_end_in_either_order(first):
    model = network()
    handle = commit_on_step(model, sgd(model))
    freeze(model)
    ends = [lambda: thaw(model), handle.remove]
    for end in ends if first == "thaw" else reversed(ends):
        assert type(model[1]) is layers.BatchNorm1d
        assert model[1].frozen == (model[1].frozen if first == "thaw" else True)
        end()
    assert type(model[1]) is nn.BatchNorm1d
    assert model[1].__dict__.keys() == nn.BatchNorm1d(5).__dict__.keys()


# Compiling.


@pytest.mark.parametrize("compiled_first", [True, False], ids=["before the handle", "after"])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, layers.BatchNorm1d], ids=["torch", "ours"])
def test_compiled_models_pool_in_one_graph_without_compiling_again(kind, compiled_first):
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), kind(5), nn.Linear(5, 2))
    optimizer = sgd(model, lr=0.0)
    compiled = torch.compile(model, fullgraph=True)
    if compiled_first:
        learn(compiled, X)
        learn(compiled, X)
    handle = commit_on_step(compiled, optimizer)
    mean = model[1].running_mean.clone()
    learn(compiled, X)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            learn(compiled, X)
            compiled(torch.full_like(X, torch.nan))
        assert handle.waiting == {"1": 4}
        optimizer.step()
        optimizer.zero_grad()
        learn(compiled, X)
    rows = model[0](X).detach().double()
    expected = mean.double().lerp(rows.mean(0), 0.1)
    torch.testing.assert_close(model[1].running_mean.double(), expected, rtol=1e-5, atol=1e-6)
    assert handle.moves == {"1": 1}
    assert handle.skipped == {"1": 3}
    assert handle.waiting == {"1": 1}


def test_compiled_models_drop_what_the_scaler_skips():
    torch.compiler.reset()
    model = network()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    handle = commit_on_step(model, optimizer)
    compiled = torch.compile(model, fullgraph=True)
    before = everything(model)
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(compiled(X).square().sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == torch.inf:
            assert_same(model, before)
    assert handle.dropped == {"1": 1, "4": 1}
    assert handle.moves == {"1": 1, "4": 1}
    rows = network()[0](X).detach().double()
    torch.testing.assert_close(model[1].running_var.double(), 0.9 + 0.1 * rows.var(0), rtol=1e-5, atol=1e-6)


def test_a_compiled_step_commits_too():
    model = network()
    optimizer = sgd(model)
    handle = commit_on_step(model, optimizer)
    step = torch.compile(lambda: optimizer.step())
    for _ in range(2):
        learn(model, X)
        step()
    assert handle.moves == {"1": 2, "4": 2}


# Beside other things.


def test_vmap_moves_at_once_as_without_a_handle():
    layer = layers.BatchNorm1d(4, momentum=1.0)
    handle = commit_on_step(layer, sgd(layer))
    x = torch.randn(3, 8, 4)
    torch.vmap(layer)(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 1)))
    assert handle.waiting == {"": 0}


def test_forgotten_outputs_are_not_counted_twice():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    x = torch.randn(4, 3, 8, 8)
    model, _ = accelerate(model, x, save_memory=True, channels_last=False, keep_memory=False)
    optimizer = sgd(model, lr=0.0)
    handle = commit_on_step(model, optimizer)
    for part in x.split(2):
        learn(model, part)
    optimizer.step()
    rows = model[0](x).detach().double().movedim(1, -1).flatten(0, 2)
    torch.testing.assert_close(model[1].running_mean.double(), 0.1 * rows.mean(0), rtol=1e-5, atol=1e-6)
    assert handle.batches == {"1": 2}


def test_a_layer_called_twice_in_a_forward_pools_both_calls():
    norm = nn.BatchNorm1d(4)
    optimizer = sgd(norm, lr=0.0)
    handle = commit_on_step(nn.ModuleList([norm, norm]), optimizer)
    a, b = torch.randn(6, 4), torch.randn(10, 4) + 3
    y = torch.cat([norm(a), norm(b)])
    y.backward(torch.randn_like(y))
    optimizer.step()
    torch.testing.assert_close(norm.running_mean, 0.1 * torch.cat([a, b]).mean(0))
    assert handle.batches == {"0": 2}


class Foreign(nn.BatchNorm1d):
    pass


def test_what_is_left_alone_is_listed():
    model = nn.Sequential(nn.BatchNorm1d(4), Foreign(4), nn.BatchNorm1d(4, track_running_stats=False))
    handle = commit_on_step(model, sgd(model))
    assert handle.refusals == {
        "1": "Foreign is neither torch's BatchNorm1d, 2d or 3d itself nor ours",
        "2": "it keeps no running statistics",
    }
    assert "left alone: '1': Foreign" in str(handle)
    model(X)
    assert model[1].num_batches_tracked.item() == 1


def test_without_a_parameter_to_watch_it_still_pools():
    norm, scale = nn.BatchNorm1d(4, affine=False), nn.Parameter(torch.ones(()), requires_grad=False)
    model = nn.ModuleList([norm, nn.ParameterList([scale])])
    optimizer = torch.optim.SGD([scale], lr=0.1)
    commit_on_step(model, optimizer)
    for part in X.split(8):
        norm(part)
    optimizer.step()
    torch.testing.assert_close(norm.running_mean, 0.1 * X.mean(0))


def held(model):
    commit_on_step(model, sgd(model))
    return model


def lazy():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d())
    return model, torch.optim.SGD(model[0].parameters(), lr=0.1)


def with_own(model):
    return model, sgd(model)


BAD = {
    "not a module": (lambda: ([network()], sgd(network())), TypeError, "needs a torch.nn.Module, got list"),
    "not an optimizer": (lambda: (network(), "sgd"), TypeError, "several, got str; .* handle.commit"),
    "one of several": (lambda: (network(), [sgd(network()), 3]), TypeError, "several, got int"),
    "no optimizer": (lambda: (network(), []), ValueError, "at least one optimizer, got an empty"),
    "no batch normalization": (
        lambda: with_own(nn.Linear(4, 3)),
        ValueError,
        "^Linear has no batch normalization whose statistics could wait for the optimizer$",
    ),
    "none that can": (
        lambda: with_own(nn.Sequential(Foreign(4))),
        ValueError,
        "no batch normalization .*: 0: Foreign is neither",
    ),
    "lazy": (lazy, ValueError, "layer '1' is still lazy: run one batch"),
    "meta": (
        lambda: with_own(nn.Sequential(nn.BatchNorm1d(3, device="meta"))),
        ValueError,
        "layer '0' is on the meta device: give the model values",
    ),
    "scripted": (
        lambda: with_own(torch.jit.script(nn.Sequential(nn.Linear(4, 3)))),
        ValueError,
        "got a scripted one",
    ),
    "second handle": (
        lambda: with_own(held(network())),
        ValueError,
        "layer '1' waits for an optimizer already",
    ),
    "optimizer of a copy": (
        lambda: (network(), sgd(network())),
        ValueError,
        "SGD holds none of Sequential's parameters",
    ),
    "second optimizer of a copy": (
        lambda: ((model := network()), [sgd(model), sgd(network())]),
        ValueError,
        r"SGD \(number 1\) holds none",
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(("make", "error", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_and_nothing_changes(make, error, says):
    model, optimizer = make()
    before = [type(m) for m in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=says):
        commit_on_step(model, optimizer)
    if before:
        assert [type(m) for m in model.modules()] == before


def test_nothing_is_looked_at_on_a_device(monkeypatch):
    """Reading a value waits for the device; here it raises."""
    model = network()
    optimizer = sgd(model)
    commit_on_step(model, optimizer)
    monkeypatch.setattr(pending, "may_look_at", lambda tensor: False)

    def forbidden(self):
        raise AssertionError("a value was looked at")

    wait = [pending.Pending(model[1]) for _ in range(2)]
    moments = [model[1].moments(torch.randn(8, 5), dtype=torch.float32) for _ in range(3)]
    for name in ("item", "__bool__", "__int__", "__float__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    model[1].weight.grad = torch.zeros(5)
    for room in wait:
        for part in moments:
            room.take(part)
        room._on_gradient(model[1].weight)
        room.take(moments[0])
        room._on_gradient(model[1].weight)
    monkeypatch.setattr("batchnorm.layers.base.commit", lambda *_: None)  # has its own branch by device
    wait[0].settle(model[1], torch.tensor(True))
    wait[1].settle(model[1])
