"""`freeze` and `thaw`: in place, through training mode, and back to exactly what was."""

import copy

import pytest
import torch
from torch import nn

from batchnorm import layers
from batchnorm.surgery import accelerate, freeze, thaw
from batchnorm.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 4),
        layers.BatchNorm1d(4, activation="relu"),
    )
    with torch.no_grad():
        for i in (1, 4):
            model[i].running_mean.normal_()
            model[i].running_var.uniform_(0.5, 2)
    return model


X = torch.randn(8, 4)


def test_frozen_layers_use_running_statistics_in_training_and_never_move_them():
    model = make()
    expected = copy.deepcopy(model).eval()(X)
    before = copy.deepcopy(model.state_dict())
    report = freeze(model)
    assert [(c.where, c.what) for c in report.changes] == [
        ("1", "frozen at its running statistics"),
        ("4", "frozen at its running statistics"),
    ]
    torch.testing.assert_close(model.train()(X), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_thaw_restores_exactly_what_was():
    model = make().train()
    model[4].bias.requires_grad_(False)
    untouched = copy.deepcopy(model)
    objects = dict(model.named_modules())
    freeze(model, affine=True)
    assert not any(p.requires_grad for i in (1, 4) for p in model[i].parameters())
    assert all(p.requires_grad for i in (0, 3) for p in model[i].parameters())
    report = thaw(model)
    assert [c.where for c in report.changes] == ["1", "4"]
    assert all(objects[name] is module for name, module in model.named_modules())
    for was, now in zip(untouched.modules(), model.modules(), strict=True):
        assert type(was) is type(now)
        assert was.__dict__.keys() == now.__dict__.keys()
        assert [p.requires_grad for p in was.parameters()] == [p.requires_grad for p in now.parameters()]
    assert torch.equal(model(X), untouched(X))
    assert torch.equal(model[1].running_mean, untouched[1].running_mean)


def test_freezing_twice_still_thaws_to_the_original():
    model = make()
    freeze(model, affine=True)
    report = freeze(model, affine=True)
    assert len(report.changes) == 2
    thaw(model)
    assert type(model[1]) is nn.BatchNorm1d
    assert all(p.requires_grad for p in model.parameters())
    assert thaw(model).changes == ()


def test_affine_is_named():
    report = freeze(make(), only="1", affine=True)
    assert report.changes[0].what == "frozen at its running statistics; weight and bias stopped too"
    assert [r.reason for r in report.refusals] == ["excluded: no pattern of only= matches"]


def test_freeze_travels_in_the_state_dict():
    model = make()
    freeze(model)
    other = make()
    freeze(other)
    thaw(other)
    other = nn.Sequential(*(copy.deepcopy(m) for m in model))
    for layer in (other[1], other[4]):
        layer.frozen = False
    other.load_state_dict(model.state_dict())
    assert other[1].frozen
    thaw(other)
    assert not other[4].frozen


def test_frozen_model_can_be_copied_and_thawed():
    model = make()
    freeze(model)
    twin = copy.deepcopy(model)
    thaw(twin)
    assert type(twin[1]) is nn.BatchNorm1d
    assert model[1].frozen


def test_half_precision_statistics_come_back():
    model = nn.Sequential(nn.BatchNorm1d(4)).bfloat16()
    model[0].running_mean.normal_()
    before = model[0].running_mean.clone()
    freeze(model)
    thaw(model)
    assert model[0].running_mean.dtype == torch.bfloat16
    assert torch.equal(model[0].running_mean, before)


def test_tied_layer_is_frozen_once():
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    assert [c.where for c in freeze(model).changes] == ["0"]
    assert model[2].frozen


def test_gradients_pass_a_frozen_layer_as_one_linear_map():
    model = make()[:2]
    freeze(model)
    x = X.clone().requires_grad_()
    cotangent = torch.randn(8, 4)
    model.train()(x).backward(cotangent)
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    torch.testing.assert_close(x.grad, (cotangent * scale) @ model[0].weight)


def test_a_thaw_keeps_what_an_accelerated_copy_carries():
    # A frozen layer of torch's that was fused became torch's again, without its activation.
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    freeze(model)
    fast, _ = accelerate(model, X, keep_memory=False)
    assert fast[1].activation == "relu"
    thaw(fast)
    assert fast[1].activation == "relu"
    assert fast.eval()(X).min() == 0


# Rows of what others do.


def test_torch_row_a_freeze_by_eval_is_undone_by_train():
    model = make()
    model[1].eval()
    before = model[1].running_mean.clone()
    model.train()(X)
    assert not torch.equal(model[1].running_mean, before)
    freeze(model)
    before = model[1].running_mean.clone()
    model.eval().train()(X)
    assert torch.equal(model[1].running_mean, before)


def test_lightning_row_a_frozen_layer_does_not_normalize_by_the_batch():
    model = make().train()
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)  # all that its freeze does to a layer in training mode
    by_batch = nn.functional.batch_norm(X, None, None, model[1].weight, model[1].bias, training=True)
    torch.testing.assert_close(model[1](X), by_batch)
    freeze(model, affine=True)
    running = model[1].running_mean, model[1].running_var
    by_running = nn.functional.batch_norm(X, *running, model[1].weight, model[1].bias)
    torch.testing.assert_close(model[1](X), by_running)
    assert not torch.allclose(model[1](X), by_batch, atol=0.1)


@pytest.mark.parametrize("momentum", [None, 0.3, 0.0], ids=str)
def test_timm_row_a_thaw_restores_momentum(momentum):
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=momentum))
    untouched = copy.deepcopy(model)
    freeze(model)
    model(X)
    thaw(model)
    assert model[0].momentum == momentum
    assert model[0].track_running_stats
    for net in (model, untouched):
        for x in (X, X + 1):
            net(x)
    for name, value in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


# Saving.


def test_a_freeze_is_loaded_from_a_state_dict_and_from_torch_save(tmp_path):
    model = make()
    freeze(model)
    ours = nn.Sequential(
        nn.Linear(4, 4), layers.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), layers.BatchNorm1d(4)
    )
    fresh = copy.deepcopy(ours)
    fresh.load_state_dict(model.state_dict())
    assert fresh[1].frozen
    assert fresh[4].frozen
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    fresh = copy.deepcopy(ours)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert fresh[1].frozen
    make().load_state_dict(model.state_dict())  # torch's layers take the tensors, and complain of nothing


def test_tensors_alone_carry_no_freeze_and_take_none_away(tmp_path):
    """A plain dict, or a run's own safetensors files: the layer keeps the flag that it has."""
    model = make()
    freeze(model)
    saved = Checkpoint(3, model.state_dict(), {}, {})
    path = save_checkpoint(tmp_path / "checkpoints", saved)
    for tensors in (load_checkpoint(path).model, {k: v.clone() for k, v in model.state_dict().items()}):
        frozen, free = make(), make()
        freeze(frozen)
        for net in (frozen, free):
            for buffer in net.buffers():
                buffer.zero_()
            net.load_state_dict(tensors)
            assert torch.equal(net[1].running_mean, model[1].running_mean)
        assert frozen[1].frozen
        assert frozen[4].frozen
        assert type(free[1]) is nn.BatchNorm1d
        assert not free[4].frozen
        torch.testing.assert_close(frozen.train()(X), model(X))


class Foreign(nn.BatchNorm1d):
    pass


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Foreign(4), "Foreign is neither torch's BatchNorm nor ours; replace it first"),
        (nn.BatchNorm1d(4, track_running_stats=False), "it keeps no running statistics to be frozen at"),
    ],
    ids=["subclass of somebody's", "no statistics"],
)
def test_refused(layer, reason):
    model = nn.Sequential(layer, nn.BatchNorm1d(4))
    report = freeze(model)
    assert [(r.where, r.reason) for r in report.refusals] == [("0", reason)]
    assert [c.where for c in report.changes] == ["1"]


def test_errors():
    with pytest.raises(ValueError, match="pattern 'bn' matches no batch normalization; there are: 1, 4"):
        freeze(make(), except_=["bn"])
    with pytest.raises(TypeError, match=r"freeze needs a torch.nn.Module, got list"):
        freeze([make()])
    with pytest.raises(TypeError, match=r"thaw needs a torch.nn.Module"):
        thaw(None)
