"""Scores and losses by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from batchnorm.choosing.examples import InMemory
from batchnorm.choosing.scoring import Judge, training_loss

X, Y = torch.randn(300, 4), torch.arange(300) % 3
CPU = torch.device("cpu")


def judge(score: str, higher: bool, **changes) -> Judge:
    return Judge(InMemory((X, Y)), **{"loss": None, "forward": None, "metric": None, **changes}, score=score,
                 higher_is_better=higher)  # fmt: skip


def test_scores_are_means_over_examples_however_they_are_cut():
    model, numbers = nn.Linear(4, 3), torch.arange(5, 300)  # a whole chunk, and 39 left over
    with torch.no_grad():
        logits = model(X[5:])
        expected = F.cross_entropy(logits, Y[5:]).item()
        accuracy = (logits.argmax(1) == Y[5:]).double().mean().item()
        assert judge("loss", False)(model, numbers, CPU) == pytest.approx(expected, rel=1e-6)
        assert judge("accuracy", True)(model, numbers, CPU) == pytest.approx(accuracy, rel=1e-12)
        own = judge("loss", False, loss=lambda output, batch: output.square().mean())
        assert own(model, numbers, CPU) == pytest.approx(logits.square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("higher", [True, False])
def test_what_is_not_finite_is_worst(higher):
    one = judge("metric", higher)
    assert one.better(0.6, 0.5) is higher
    assert one.better(0.5, 0.6) is not higher
    assert not one.better(0.5, 0.5)
    for lost in (math.nan, math.inf, -math.inf):
        assert one.better(0.5, lost)
        assert not one.better(lost, 0.5)
        assert not one.better(lost, math.nan)


@pytest.mark.parametrize(
    "output",
    [
        X[:4, :3],
        (X[:4, :3], "more"),
        {"logits": X[:4, :3]},
        SimpleNamespace(logits=X[:4, :3], loss=None),
    ],
    ids=["scores", "first of several", "mapping", "attribute"],
)
def test_cross_entropy_of_class_scores_wherever_they_are(output):
    expected = F.cross_entropy(X[:4, :3], Y[:4])
    torch.testing.assert_close(training_loss(output, (X[:4], Y[:4]), None), expected)


def test_the_outputs_own_loss_comes_first_and_the_users_before_it():
    own = torch.tensor(2.5)
    assert training_loss({"loss": own, "logits": X[:4, :3]}, (X[:4], Y[:4]), None) is own
    assert training_loss(SimpleNamespace(loss=own), {}, None) is own
    given = torch.tensor(1.0)
    assert training_loss({"loss": own}, {}, lambda output, batch: given) is given
