import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchnorm.data import ImageData, to_input
from batchnorm.train import bn_mlp, evaluate_runs, mlp, predictions, train
from batchnorm.train.build import build_model
from batchnorm.train.evaluate import score
from batchnorm.train.feed import MemoryFeed, Part
from batchnorm.train.metrics import read_metrics
from batchnorm.train.predictions import predict
from batchnorm.train.statistics import with_population_statistics

CPU = torch.device("cpu")


@settings(deadline=None, max_examples=30)
@given(num_examples=st.integers(1, 20), num_classes=st.integers(1, 12), seed=st.integers(0, 1000))
def test_scores_are_counted_as_by_hand(num_examples, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    predictions = torch.randn(num_examples, num_classes, generator=generator).double().log_softmax(1)
    labels = np.random.default_rng(seed).integers(0, num_classes, num_examples)
    scores = score(predictions, labels)
    rows = [sorted(range(num_classes), key=lambda c, row=row: -row[c]) for row in predictions.tolist()]
    truth = labels.tolist()
    assert scores.top1 == pytest.approx(
        sum(row[0] == t for row, t in zip(rows, truth, strict=True)) / num_examples
    )
    assert scores.top5 == pytest.approx(
        sum(t in row[:5] for row, t in zip(rows, truth, strict=True)) / num_examples
    )
    assert scores.loss == pytest.approx(
        -sum(predictions[i, t].item() for i, t in enumerate(truth)) / num_examples
    )
    assert scores.num_examples == num_examples


def test_loss_of_a_hopeless_network_is_not_capped():
    class Far(nn.Module):
        def forward(self, x):
            return torch.tensor([0.0, 1e30]).expand(len(x), 2)

    parts = [Part(iter([torch.zeros(n, 2, 2)]), np.zeros(n, np.int64)) for n in (2, 1)]
    said = predict(Far().eval(), parts)
    assert score(said.log_probabilities, said.labels).loss == pytest.approx(1e30, rel=1e-6)


@pytest.fixture(scope="module")
def noise():
    """Three classes, told apart by the place of a bright bar."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 260)
    images = random.integers(0, 150, (260, 6, 6), dtype=np.uint8)
    images[np.arange(260), labels] = random.integers(100, 256, (260, 6), dtype=np.uint8)
    return ImageData("digits", images[:200], labels[:200], images[200:], labels[200:], ("a", "b", "c"))


RECIPE = replace(
    bn_mlp(), hidden=(8, 8), steps=30, batch_size=20, log_every=30, eval_every=30, checkpoint_every=10,
    recalibrate_examples=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(noise, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        train(replace(RECIPE, seed=seed), noise, folder / f"seed-{seed}", progress=False, tensorboard=False)
    return folder


@pytest.fixture
def from_disk(noise, monkeypatch):
    """evaluate_runs loads data by name; hand it the noise."""
    asked = []

    def load(name, data_dir, *, size):
        asked.append((name, data_dir, size))
        return noise

    monkeypatch.setattr(predictions, "load", load)
    return asked


def test_population_statistics_are_of_the_whole_set_on_a_copy(noise):
    model = build_model(RECIPE, (6, 6), 3)
    before = copy.deepcopy(model.state_dict())
    images = torch.from_numpy(noise.train_images)
    twin = with_population_statistics(model, MemoryFeed(RECIPE, noise, CPU).statistics)
    assert model.training
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    outputs = to_input(images, binarize=True).flatten(1).double() @ model.linear1.weight.double().T
    (first, _) = (m for m in twin.modules() if isinstance(m, nn.BatchNorm1d))
    torch.testing.assert_close(first.running_mean.double(), outputs.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.running_var.double(), outputs.var(0), rtol=1e-5, atol=1e-6)
    # Fewer examples: a fixed choice, other statistics.
    fewer = MemoryFeed(replace(RECIPE, recalibrate_examples=50), noise, CPU)
    few = [with_population_statistics(model, fewer.statistics) for _ in range(2)]
    means = [next(m for m in t.modules() if isinstance(m, nn.BatchNorm1d)).running_mean for t in (*few, twin)]
    assert means[0].equal(means[1])
    assert not torch.allclose(means[0], means[2])


def test_network_without_bn_needs_no_statistics(noise):
    model = build_model(replace(RECIPE, normalize=False), (6, 6), 3)
    twin = with_population_statistics(model, MemoryFeed(RECIPE, noise, CPU).statistics)
    assert not twin.training
    assert all(p.equal(q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_run_scores_are_those_of_its_last_row(runs, from_disk):
    (result,) = evaluate_runs([runs / "seed-0"], data_dir="somewhere")
    assert result.name == str(runs / "seed-0")
    last = read_metrics(runs / "seed-0" / "metrics.jsonl")[-1]
    assert (result.scores.top1, result.scores.loss) == (last["accuracy"], last["test_loss"])
    assert result.scores.top5 == 1.0
    assert result.scores.num_examples == 60
    assert from_disk == [("digits", "somewhere", 6)]


def test_checkpoint_gets_fresh_population_statistics(runs, from_disk, noise):
    (newest,) = evaluate_runs([runs / "seed-0"], checkpoint="newest")
    (final,) = evaluate_runs([runs / "seed-0"])
    assert newest.scores == final.scores
    (early,) = evaluate_runs([runs / "seed-0"], checkpoint="20")
    row = next(row for row in read_metrics(runs / "seed-0" / "metrics.jsonl") if row["step"] == 20)
    assert (early.scores.top1, early.scores.loss) == (row["accuracy"], row["test_loss"])


def test_ensemble_is_the_mean_of_probabilities(runs, from_disk, noise):
    results = evaluate_runs([runs / "seed-0", runs / "seed-1"])
    assert [result.name for result in results][2] == "ensemble of 2"
    images = torch.from_numpy(noise.test_images)
    members = []
    for seed in (0, 1):
        finished = train(
            replace(RECIPE, seed=seed), noise, runs / f"seed-{seed}", progress=False, tensorboard=False
        )
        with torch.no_grad():
            members.append(finished.model(to_input(images, binarize=True)).double().softmax(1))
    mean = (members[0] + members[1]) / 2
    truth = torch.from_numpy(noise.test_labels)
    assert results[2].scores.top1 == pytest.approx((mean.argmax(1) == truth).double().mean().item())
    assert results[2].scores.loss == pytest.approx(
        -mean[torch.arange(60), truth].log().mean().item(), rel=1e-9
    )


def test_changed_data_are_refused(runs, monkeypatch, noise):
    changed = replace(noise, test_labels=noise.test_labels[::-1].copy())
    monkeypatch.setattr(predictions, "load", lambda *_, **__: changed)
    with pytest.raises(ValueError, match="was trained on other data"):
        evaluate_runs([runs / "seed-0"])


def test_runs_on_different_data_are_no_ensemble(runs, noise, tmp_path, monkeypatch):
    other = replace(noise, test_images=noise.test_images[:30], test_labels=noise.test_labels[:30])
    recipe = replace(mlp(), hidden=(4,), steps=1, batch_size=20)
    train(recipe, other, tmp_path / "other", progress=False, tensorboard=False)
    answers = iter([noise, other])
    monkeypatch.setattr(predictions, "load", lambda *_, **__: next(answers))
    with pytest.raises(ValueError, match="no ensemble of both"):
        evaluate_runs([runs / "seed-0", tmp_path / "other"])


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="at least one run"):
        evaluate_runs([])
