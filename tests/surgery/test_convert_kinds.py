"""`convert` among the kinds of our layers, each with options of its own."""

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
    by_intent = "differs in training by intent: every ghost of the batch is normalized by its own moments"
    assert [(n.where, n.what) for n in report.notes] == [
        ("", "not compared in training, where layers differ by intent; both models run"),
        ("1", by_intent),
        ("5", by_intent),
    ]
    assert "ghost_size=3" in repr(new)
    same, again = bn.convert(new, "ghost", X, ghost_size=3)
    assert again.changes == ()
    other, again = bn.convert(same, "ghost", X, ghost_size=2)
    assert again.changes[0].what.startswith("now batchnorm.GhostBatchNorm2d, ghost_size=2")
    assert other[1].ghost_size == 2
    assert new[1].ghost_size == 3


def test_a_kind_that_fails_on_the_example_in_training_is_not_returned():
    with pytest.raises(RuntimeError, match=r"in training the new model fails .* ghost_size=1"):
        bn.convert(network(), "ghost", X, ghost_size=1)
