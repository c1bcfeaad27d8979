"""`convert` among the kinds of our layers, each with options of its own."""

import copy

import pytest
import torch
from torch import nn

import batchnorm as bn


def network():
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, nn.Linear(144, 5), nn.BatchNorm1d(5))


X = torch.randn(6, 3, 8, 8)


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("plain", {"group_size": 2}, "to='plain' takes no options, got group_size, which is of to='synced'"),
        ("torch", {"ghost_size": 2}, "to='torch' takes no options, got ghost_size, which is of to='ghost'"),
        ("ghost", {"size": 2}, "to='ghost' takes ghost_size, got size"),
        ("ghost", {"ghost_size": 2, "size": None}, "to='ghost' takes ghost_size, got size"),
        ("ghost", {}, "to='ghost' takes ghost_size: give ghost_size=…"),
        ("ghost", {"ghost_size": 0}, "ghost_size must be a positive whole number of examples, got 0"),
        ("ghost", {"ghost_size": 2.5}, "ghost_size must be a positive whole number of examples, got 2.5"),
        ("synced", {"ghost_size": 2}, "to='synced' takes group and group_size, got ghost_size"),
        ("whole", {}, "to='whole' is no kind of normalization; there are 'plain', 'torch', 'synced'"),
    ],
)
def test_options_that_a_kind_has_not_or_lacks_are_refused(to, options, message):
    with pytest.raises(ValueError, match=message):
        bn.convert(network(), to, X, **options)


def test_an_option_of_another_kind_that_is_none_is_not_given():
    new, _ = bn.convert(network(), "plain", X, group=None, ghost_size=None)
    assert type(new[1]) is bn.BatchNorm2d


def test_ghosts_differ_in_training_by_intent_and_agree_in_evaluation():
    new, report = bn.convert(network(), "ghost", X, ghost_size=3)
    assert [(c.where, c.what) for c in report.changes] == [
        ("1", "now batchnorm.GhostBatchNorm2d, ghost_size=3"),
        ("5", "now batchnorm.GhostBatchNorm1d, ghost_size=3"),
    ]
    assert [a.mode for a in report.agreement] == ["evaluation"]
    assert report.check == 0
    assert [n.what for n in report.notes] == [
        "2 layers differ in training by intent: every ghost of the batch is normalized by its own moments",
        "not compared in training, where they differ by intent; both models run",
    ]
    assert "ghost_size=3" in repr(new)
    same, again = bn.convert(new, "ghost", X, ghost_size=3)
    assert again.changes == ()
    other, again = bn.convert(same, "ghost", X, ghost_size=2)
    assert again.changes[0].what == "now batchnorm.GhostBatchNorm2d, ghost_size=2"
    assert other[1].ghost_size == 2
    assert new[1].ghost_size == 3


def test_a_kind_that_fails_on_the_example_in_training_is_not_returned():
    with pytest.raises(RuntimeError, match=r"in training the new model fails .* ghost_size=1"):
        bn.convert(network(), "ghost", X, ghost_size=1)


OURS = {
    "plain": ({}, bn.BatchNorm2d, bn.BatchNorm1d),
    "torch": ({}, nn.BatchNorm2d, nn.BatchNorm1d),
    "synced": ({}, bn.SyncedBatchNorm2d, bn.SyncedBatchNorm1d),
    "ghost": ({"ghost_size": 2}, bn.GhostBatchNorm2d, bn.GhostBatchNorm1d),
    "renorm": ({"r_max": 2.0, "d_max": bn.Ramp(0.0, 1.0, 3, 9)}, bn.BatchRenorm2d, bn.BatchRenorm1d),
}


def trained(kind):
    """A model of a kind in the middle of its training, with its optimizer."""
    model, _ = bn.convert(network(), kind, **OURS[kind][0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        step(model, optimizer, torch.randn(6, 3, 8, 8) * 2 + 1)
    model[1].weight.requires_grad_(False)
    return model, optimizer


def step(model, optimizer, x):
    optimizer.zero_grad()
    torch.manual_seed(1)
    y = model(x)
    y.backward(torch.randn_like(y))
    optimizer.step()


@pytest.mark.parametrize("start", OURS)
@pytest.mark.parametrize("to", OURS)
def test_there_and_back_is_the_model_that_it_was(start, to):
    model, optimizer = trained(start)
    before = copy.deepcopy(model)
    there, report = bn.convert(model, to, X, **OURS[to][0])
    assert (type(there[1]), type(there[5])) == OURS[to][1:]
    assert report.refusals == ()
    assert torch.equal(copy.deepcopy(there).eval()(X), copy.deepcopy(model).eval()(X)) or report.check < 1e-6
    assert ("training" in [a.mode for a in report.agreement]) == (
        bool(report.changes) and {start, to} <= {"plain", "torch", "synced"}
    )
    back, _ = bn.convert(there, start, X, **OURS[start][0])
    assert {**vars(back[1]), "_corrections": None}.keys() == {**vars(before[1]), "_corrections": None}.keys()
    assert not back[1].weight.requires_grad
    for name, value in before.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    # And its optimizer goes on, bit for bit.
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    _, again = bn.convert(model, to, **OURS[to][0])
    third, final = bn.convert(model, start, **OURS[start][0])
    final.repoint(optimizer)
    for x in (X, X * 2):
        step(third, optimizer, x)
        step(twin, twin_optimizer, x)
    for p, q in zip(third.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(again.changes) == (0 if start == to else 2)


@pytest.mark.parametrize("kind", ["ghost", "renorm"])
def test_shared_layers_hooks_frozen_flags_and_activations_stay(kind):
    options, seen = OURS[kind][0], []
    norm = bn.BatchNorm1d(4, activation="relu", momentum=None, channel_dim=-1)
    norm.register_forward_hook(lambda *_: seen.append(1))
    frozen = bn.BatchNorm1d(4)
    frozen.frozen = True
    model = nn.ModuleDict({"a": norm, "b": norm, "c": frozen, "d": bn.BatchNormPerActivation((4, 2))})
    model.note = [norm]
    new, report = bn.convert(model, kind, **options)
    assert new["a"] is new["b"] is new.note[0]
    assert [c.where for c in report.changes] == ["a", "c", "d"]
    assert (new["a"].activation, new["a"].momentum, new["a"].channel_dim) == ("relu", None, -1)
    assert new["c"].frozen
    x = torch.randn(5, 4)
    assert torch.equal(new["c"](x), frozen(x))
    new["b"](torch.randn(5, 3, 4))
    assert len(seen) == 1
    assert norm.num_batches_tracked == 0
    assert new["d"].weight.shape == (4, 2)
    back, report = bn.convert(new, "plain")
    assert [type(m) for m in back.values()] == [type(m) for m in model.values()]
    assert "; the batch is" in report.changes[0].what


def test_sync_and_frozen_classes_become_a_kind_at_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
    new, _ = bn.convert(model, "ghost", X, ghost_size=3)
    assert type(new[1]) is bn.GhostBatchNorm2d
    assert not hasattr(new[1], "process_group")


def test_renormalization_is_refused_without_running_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    new, report = bn.convert(model, "renorm", torch.randn(4, 3))
    assert [type(m) for m in new] == [nn.BatchNorm1d, bn.BatchRenorm1d]
    assert "it keeps no running statistics" in report.refusals[0].reason
    with pytest.raises(ValueError, match="r_max must be a finite number of 1 or more, got 0"):
        bn.convert(model, "renorm", r_max=0)


def test_a_subclass_is_left_alone():
    class Mine(bn.GhostBatchNorm1d):
        pass

    _, report = bn.convert(nn.Sequential(Mine(3, ghost_size=2)), "plain")
    assert "Mine is a subclass of GhostBatchNorm1d" in report.refusals[0].reason


@pytest.mark.parametrize("kind", ["ghost", "renorm"])
def test_what_the_rest_of_the_library_does_with_such_layers(kind):
    plain, _ = bn.convert(network(), "plain")
    for _ in range(4):
        plain(torch.randn(6, 3, 8, 8) * 2 + 1)
    model, _ = bn.convert(plain, kind, **OURS[kind][0])
    # accelerate fuses into the kind, and computes the same in both modes.
    for save_memory in (False, True):
        fused, report = bn.accelerate(model, X, save_memory=save_memory)
        assert type(fused[1]) is OURS[kind][1]
        assert fused[1].activation == "relu"
        assert [a.mode for a in report.agreement] == ["training", "evaluation"]
        assert all(a.largest <= a.allowed for a in report.agreement)
    # fold sees the plain layer that it is at inference.
    folded, _ = bn.fold(copy.deepcopy(model).eval(), X)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(folded(X), copy.deepcopy(model).eval()(X), rtol=1e-4, atol=1e-5)
    # recalibrate measures the population, whatever the virtual batches.
    batches = [torch.randn(num, 3, 8, 8) * 3 - 1 for num in (5, 8)]
    bn.recalibrate(model, batches)
    bn.recalibrate(plain, batches)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    bn.freeze(model)
    assert torch.equal(model.train()(X), copy.deepcopy(plain).eval()(X))
    bn.thaw(model)
    assert not torch.allclose(model(X), plain(X), atol=1e-3)
