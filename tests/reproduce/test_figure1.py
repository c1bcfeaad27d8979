"""Figure 1: the stack trains what single networks would, jobs resume, and summaries count rightly."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.data import batch_indices, load, to_input
from batchnorm.models import mlp
from batchnorm.models.stack import StackedMLP
from batchnorm.reproduce.activations import Activations, run_experiment
from batchnorm.reproduce.activations.job import History, path_of, train
from batchnorm.reproduce.activations.summary import (
    Histories,
    drift,
    milestones,
    path_length,
    speed_up,
    summarize,
    typical_unit,
)
from batchnorm.reproduce.claiming import science

RATES = (0.05, 0.5, 2.0)


@pytest.fixture(scope="module")
def digits():
    return load("digits", progress=False)


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "bn"])
def test_each_copy_of_the_stack_trains_as_a_network_of_its_own(digits, normalize):
    # In float64: rounding grows with the steps, all the more at a high rate.
    images = to_input(torch.from_numpy(digits.train_images), binarize=True).flatten(1).double()
    labels = torch.from_numpy(digits.train_labels)
    stack = StackedMLP(len(RATES), normalize=normalize, seed=7).double()
    singles = [mlp(seed=7).double() for _ in RATES]
    if normalize:
        singles = [bn.insert(net, images[:60])[0] for net in singles]
    optimizers = [torch.optim.SGD(net.parameters(), lr=lr) for net, lr in zip(singles, RATES, strict=True)]
    stacked = torch.optim.SGD(stack.parameters(), lr=1.0)
    for step in range(30):
        chosen = batch_indices(step, 60, len(labels), seed=7)
        stacked.zero_grad()
        losses = stack.losses(images[chosen], labels[chosen])
        losses.backward(torch.tensor(RATES).double())
        stacked.step()
        for k, (net, optimizer) in enumerate(zip(singles, optimizers, strict=True)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images[chosen]), labels[chosen])
            torch.testing.assert_close(losses[k], loss, rtol=1e-6, atol=0)
            loss.backward()
            optimizer.step()
    logits = stack(images[:100])
    for k, net in enumerate(singles):
        torch.testing.assert_close(logits[:, k], net(images[:100]), rtol=1e-5, atol=1e-6)


def small(out, **changes) -> Activations:
    settings = {
        "steps": 40,
        "evaluate_every": 20,
        "seeds": 2,
        "rates": (0.1, 0.5),
        "processes": 2,
        "out": out,
    }
    return Activations(**{**settings, **changes})


def test_evaluation_uses_the_statistics_of_the_whole_population(digits, tmp_path):
    experiment = small(tmp_path, statistics_examples=300)
    history = train(experiment, digits, seed=0, normalize=True)
    assert history.steps.tolist() == experiment.evaluation_steps == [0, 2, 4, 8, 12, 16, 20, 40]
    # At step 0, by hand: the network as built, statistics of 300 training images at once, all test images.
    order = torch.randperm(len(digits.train_images), generator=torch.Generator().manual_seed(0))[:300]
    known = to_input(torch.from_numpy(digits.train_images), binarize=True)[order].flatten(1)
    test = to_input(torch.from_numpy(digits.test_images), binarize=True).flatten(1)
    h, t = known, test
    for layer, weight in enumerate(m.weight.detach().T for m in mlp(seed=0) if isinstance(m, nn.Linear)):
        h, t = h @ weight, t @ weight
        if layer < 3:
            t = (t - h.mean(0)) / (h.var(0) + 1e-5).sqrt()
            expected = np.percentile(t.numpy(), (15, 50, 85), axis=0).T
            np.testing.assert_allclose(history.percentiles[0, 0, layer], expected, rtol=1e-3, atol=1e-3)
            h = torch.sigmoid((h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt())
            t = torch.sigmoid(t)
    accuracy = (t.argmax(1).numpy() == digits.test_labels).mean()
    assert history.accuracy[0, 0] == pytest.approx(accuracy)


def test_a_second_call_does_only_what_is_missing(tmp_path):
    experiment = small(tmp_path / "run")
    first = run_experiment(experiment)
    kept, damaged = path_of(experiment, 0, True), path_of(experiment, 1, False)
    before = kept.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:500])
    second = run_experiment(experiment)
    assert kept.stat().st_mtime_ns == before
    for result in (first, second):
        result.pop("seconds"), result.pop("wall_s")
    assert second == first  # the damaged job was trained again, to the same numbers
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    assert stored["rates"] == second["rates"]


def test_a_folder_of_another_experiment_is_refused_and_kept(tmp_path):
    run_experiment(small(tmp_path, seeds=1))
    files = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"other settings \(rates \[0.1, 0.5\] there, \[0.1\] asked\)"):
        run_experiment(small(tmp_path, seeds=1, rates=(0.1,)))
    assert sorted(path.name for path in tmp_path.rglob("*")) == files


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"rates": (0.1, 0.1)}, "different from each other"),
        ({"rates": (0.1, -1.0)}, "rates must be positive"),
        ({"headline_rate": 0.3}, r"headline_rate 0.3 is not one of the rates \(0.1, 0.5\)"),
        ({"init_std": 0.0}, "init_std must be positive"),
        ({"processes": 0}, "processes must be at least 1"),
    ],
    ids=lambda v: str(v),
)
def test_wrong_settings_are_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        small(tmp_path, **change)


STEPS = np.array([0, 100, 200, 300, 400])


def test_speed_up_counts_steps_to_the_plain_networks_best():
    plain = np.array([[0.1, 0.2, 0.5, 0.9, 0.8], [0.1, 0.2, 0.3, 0.4, 0.5]])
    with_bn = np.array([[0.1, 0.9, 0.95, 0.95, 0.9], [0.1, 0.1, 0.2, 0.3, 0.4]])
    result = speed_up(STEPS, plain, with_bn)
    assert result["seeds"][0] == {"best": 0.9, "plain_steps": 300, "bn_steps": 100, "ratio": 3.0}
    assert result["seeds"][1] == {"best": 0.5, "plain_steps": 400, "bn_steps": None, "ratio": None}
    assert result["reached"] == 1
    assert result["median_ratio"] == 1.5  # of 3 and 0: never reaching it is not left out


def test_milestones_are_the_step_by_which_half_of_the_seeds_are_there():
    accuracy = np.array([[0.1, 0.85, 0.9, 0.9, 0.96], [0.1, 0.2, 0.8, 0.9, 0.9], [0.1, 0.1, 0.1, 0.8, 0.85]])
    assert milestones(STEPS, accuracy) == [200, 300, None, None, None]


def test_drift_is_the_medians_way_in_widths_of_the_distribution():
    # One unit: median 0 → 1 → 1, between 15th and 85th percentile 4, then 2.
    percentiles = np.array([[-2.0, 0.0, 2.0], [0.0, 1.0, 2.0], [-1.0, 1.0, 2.0]])
    np.testing.assert_allclose(drift(np.array([0, 500, 1000]), percentiles), [1.0, 0.0])  # 1/2 in 500 steps
    assert path_length(percentiles) == pytest.approx(0.5)


def test_the_typical_unit_has_the_median_way_to_go():
    ways = np.array([5.0, 1.0, 3.0])
    percentiles = np.stack([np.stack([way * t + np.array([-1.0, 0, 1.0]) for way in ways]) for t in range(4)])
    assert typical_unit(percentiles) == 2


def test_summary_puts_the_right_seed_rate_and_kind_together(tmp_path):
    experiment = small(tmp_path)

    def history(accuracy: float) -> History:
        steps = np.array([0, 500])
        curves = np.array([[0.1, accuracy], [0.1, accuracy + 0.01]])
        percentiles = np.tile(np.array([-1.0, 0, 1]), (2, 2, 3, 5, 1))
        return History(steps, curves, curves, percentiles, np.array([1.0, 2.0]))

    histories = Histories(plain=[history(0.5), history(0.7)], bn=[history(0.8), history(0.6)])
    first, second = summarize(experiment, histories)["rates"]
    assert first["final"]["plain"]["mean"] == pytest.approx(0.6)
    assert second["final"]["bn"]["mean"] == pytest.approx(0.71)
    assert first["final"]["difference"]["mean"] == pytest.approx(0.1)
    assert first["final"]["difference"]["std"] == pytest.approx(np.std([0.3, -0.1], ddof=1))
    assert (first["compared"], first["mean_above"], first["pairs_above"]) == (1, 1, 1)


@pytest.mark.parametrize(("rates", "headline"), [((0.5, 0.1), 0.1), ((1.0, 0.5), 0.5)])
def test_the_headline_is_a_rate_that_was_trained(tmp_path, rates, headline):
    assert small(tmp_path, rates=rates).headline_rate == headline


def test_settings_survive_json(tmp_path):
    experiment = small(tmp_path)
    assert json.loads(json.dumps(science(experiment))) == science(experiment)
    hidden = set(vars(experiment)) - set(science(experiment))
    assert hidden == {"data_dir", "out", "processes"}
    assert science(dataclasses.replace(experiment, processes=7)) == science(experiment)
