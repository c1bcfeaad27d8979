"""Section 3.4: cells differ in what they are to differ in, and verdicts follow the numbers."""

import json
import math

import numpy as np
import pytest
import torch
from browsing import requests_of
from torch import nn

from batchnorm.data import ImageData, batch_indices
from batchnorm.layers import BatchNorm1d, BatchNorm2d
from batchnorm.paired import student_t
from batchnorm.reproduce.regularization import Regularization
from batchnorm.reproduce.regularization.job import accuracy, divide, names, num_steps, run_part, train
from batchnorm.reproduce.regularization.networks import network
from batchnorm.reproduce.regularization.page import claims, points, spread, write_report
from batchnorm.reproduce.regularization.summary import summarize
from batchnorm.reproduce.training import path_of

GREY, COLOUR = (8, 8), (3, 8, 8)


def small(out, **changes) -> Regularization:
    settings = {"seeds": 2, "dropouts": (0.0, 0.5), "batch_sizes": (4, 16), "rates": (0.03, 0.1)}
    return Regularization(**{**settings, "examples": 32, "held_out": 20, "epochs": 2, "out": out, **changes})


def images(shape, num=80) -> ImageData:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (num + 40, *shape), dtype=np.uint8)
    labels = random.integers(0, 3, num + 40)
    pixels[..., 0, 0] = 100 * labels.reshape(-1, *[1] * (len(shape) - 2))
    return ImageData("planted", pixels[:num], labels[:num], pixels[num:], labels[num:], ("a", "b", "c"))


@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_networks_of_a_seed_start_alike_and_differ_in_bn_and_dropout_alone(shape):
    made = {
        (normalize, dropout): network(shape, 10, normalize=normalize, dropout=dropout, seed=3)
        for normalize in (False, True)
        for dropout in (0.0, 0.5)
    }
    weights = {
        cell: [m.weight for m in net if isinstance(m, nn.Linear | nn.Conv2d)] for cell, net in made.items()
    }
    first = weights.pop((False, 0.0))
    for others in weights.values():
        assert all(torch.equal(a, b) for a, b in zip(first, others, strict=True))
    hidden = [w for w in first if len(w) > 10]
    assert hidden[-1].std().item() == pytest.approx(math.sqrt(2 / hidden[-1][0].numel()), rel=0.05)
    for (normalize, dropout), net in made.items():
        norms = [m for m in net if isinstance(m, BatchNorm1d | BatchNorm2d)]
        assert len(norms) == (len(hidden) if normalize else 0)
        assert {m.p for m in net if isinstance(m, nn.Dropout)} == {dropout}
        biases = [m.bias for m in net if isinstance(m, nn.Linear | nn.Conv2d)]
        assert [b is None for b in biases] == [normalize] * len(hidden) + [False]
        assert net(torch.zeros(2, *shape)).shape == (2, 10)
    order = [type(m).__name__ for m in made[True, 0.5]]
    if shape == GREY:
        assert order[1:5] == ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    else:
        assert order[-3:] == ["Flatten", "Dropout", "Linear"]
        assert order.count("Dropout") == 1


@pytest.mark.parametrize("shape", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_seed_divides_the_data_and_scales_them(tmp_path, shape):
    data = images(shape)
    parts = divide(small(tmp_path), data, seed=1)
    assert [len(part.labels) for part in parts] == [32, 20, 40]
    axes = (0, 1, 2) if shape == GREY else (0, 2, 3)
    std, mean = torch.std_mean(parts.train.images, axes)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std))

    def rows(part):
        return {tuple(row) for row in part.images.flatten(1).mul(1e3).round().int().tolist()}

    # No image is both trained on and held out, and another seed takes others.
    assert len(rows(parts.train) | rows(parts.held_out)) == 52
    other = divide(small(tmp_path), data, seed=2)
    assert not torch.equal(other.train.labels, parts.train.labels)
    with pytest.raises(ValueError, match="examples 32 and held_out 60 need 92 images, and planted has 80"):
        divide(small(tmp_path, held_out=60), data, seed=0)


def test_training_is_sgd_with_momentum_at_the_rates_of_the_rule(tmp_path):
    experiment = small(tmp_path)
    parts = divide(experiment, images(GREY), seed=0)
    nets = [network(GREY, 3, normalize=True, dropout=0.0, seed=0) for _ in range(2)]
    found = train(experiment, nets[0], parts, 0.1, 16, seed=0)
    assert experiment.steps(16) == 4
    velocity = [torch.zeros_like(p) for p in nets[1].parameters()]
    losses = []
    for step in range(4):
        chosen = batch_indices(step, 16, 32, 0)
        loss = nn.functional.cross_entropy(nets[1](parts.train.images[chosen]), parts.train.labels[chosen])
        losses.append(loss.item())
        rate = 0.1 * (16 / 32) * 0.5 * (1 + math.cos(math.pi * step / 4))
        gradients = torch.autograd.grad(loss, list(nets[1].parameters()))
        with torch.no_grad():
            for p, v, g in zip(nets[1].parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g)
                p.sub_(rate * v)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert found["loss"] == pytest.approx(sum(losses[2:]) / 2, rel=1e-5)
    # Tests are by population statistics of the training images: what training mode makes of all at once.
    reference = nets[1].train()
    logits = reference(parts.train.images)
    assert found["train"] == (logits.argmax(1) == parts.train.labels).double().mean().item()


def test_dropout_draws_from_the_seed_and_leaves_the_callers_stream_alone(tmp_path):
    experiment = small(tmp_path)
    parts = divide(experiment, images(GREY), seed=0)
    before = torch.random.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        torch.rand(3)
        net = network(GREY, 3, normalize=False, dropout=0.5, seed=0)
        stream = torch.random.get_rng_state()
        runs.append(train(experiment, net, parts, 0.03, 4, seed))
        assert torch.equal(torch.random.get_rng_state(), stream)
    torch.random.set_rng_state(before)
    assert runs[0] == runs[1]
    assert runs[0]["loss"] != runs[2]["loss"]
    assert runs[0]["test"] == runs[0]["moving"]


def test_a_loss_that_is_not_finite_is_a_result(tmp_path):
    experiment = small(tmp_path)
    parts = divide(experiment, images(GREY), seed=0)
    found = train(experiment, network(GREY, 3, normalize=False, dropout=0.0, seed=0), parts, 1e30, 4, 0)
    assert 1 <= found.pop("diverged") < 16
    assert found == dict.fromkeys(("loss", "train", "held_out", "test", "moving"))


def test_accuracy_counts_in_evaluation_mode():
    net = nn.Sequential(nn.Dropout(0.9), nn.Linear(2, 2, bias=False))
    nn.init.eye_(net[1].weight)
    x = torch.tensor([[2.0, 1.0], [1.0, 2.0], [3.0, 1.0], [1.0, 4.0]])
    from batchnorm.reproduce.regularization.job import Labelled

    assert accuracy(net, Labelled(x, torch.tensor([0, 1, 0, 0]))) == 0.75


def run_of(rate, test, *, train_accuracy=1.0, held_out=None, diverged=None):
    if diverged is not None:
        return {
            "rate": rate,
            "diverged": diverged,
            **dict.fromkeys(("loss", "train", "held_out", "test", "moving")),
        }
    held_out = test if held_out is None else held_out
    scores = {"loss": 0.1, "train": train_accuracy, "held_out": held_out, "test": test, "moving": test}
    return {"rate": rate, "diverged": None, **scores}


def planted(tmp_path, tests, **runs):
    """Parts whose two seeds have these test accuracies, by kind and dropout, at every batch size."""
    experiment = small(tmp_path)
    parts = {}
    for name, (_, _, kind, dropout, _, seed) in names(experiment).items():
        value = tests[kind, dropout][seed]
        parts[name] = {"runs": [run_of(0.03, value), run_of(0.1, value - 0.1)]}
    return experiment, parts


EVEN = {("plain", 0.0): (0.8, 0.82), ("plain", 0.5): (0.84, 0.86)}
"""Without BN, dropout adds 4 points with both seeds."""


@pytest.mark.parametrize(
    ("with_bn", "verdicts"),
    [
        ({("bn", 0.0): (0.90, 0.92), ("bn", 0.5): (0.85, 0.87)}, ["holds", "holds", "holds"]),
        ({("bn", 0.0): (0.90, 0.92), ("bn", 0.5): (0.95, 0.97)}, ["misses", "holds", "holds"]),
        ({("bn", 0.0): (0.70, 0.72), ("bn", 0.5): (0.60, 0.90)}, ["holds", "misses", "misses"]),
        (
            {("plain", 0.5): (0.7, 0.72), ("bn", 0.0): (0.9, 0.92), ("bn", 0.5): (0.8, 0.82)},
            ["partly", "holds", "holds"],
        ),
    ],
    ids=["dropout hurts with BN", "dropout helps with BN", "BN hurts", "dropout hurts with and without"],
)
def test_verdicts_follow_the_numbers(tmp_path, with_bn, verdicts):
    summary = summarize(*planted(tmp_path, {**EVEN, **with_bn}))
    assert [claim.verdict for claim in claims(summary)] == verdicts


def test_dropout_that_helps_at_fewer_batch_sizes_with_bn_is_partly_needed(tmp_path):
    experiment, parts = planted(tmp_path, {**EVEN, ("bn", 0.0): (0.90, 0.92), ("bn", 0.5): (0.95, 0.97)})
    for seed in range(2):
        parts[f"bn-dropout-0.5-batch-16-seed-{seed}"] = {"runs": [run_of(r, 0.5) for r in (0.03, 0.1)]}
    claim = claims(summarize(experiment, parts))[0]
    assert claim.verdict == "partly"
    assert "with BN batch 4: +5.00 ± 0.00 (p = 0.5); batch 16: −41.00 ± 12.71 (p = 0.5)." in claim.ours
    assert (
        "Of all 2 cells with BN dropout helps for certain in 1 and hurts in 1; without BN in 2" in claim.note
    )


def test_gains_and_interaction_by_hand(tmp_path):
    summary = summarize(*planted(tmp_path, {**EVEN, ("bn", 0.0): (0.90, 0.92), ("bn", 0.5): (0.91, 0.89)}))
    row = summary["dropout"][0]
    assert (row["batch_size"], row["dropout"]) == (4, 0.5)
    assert row["plain"]["values"] == pytest.approx([0.04, 0.04])
    assert row["bn"]["values"] == pytest.approx([0.01, -0.03])
    assert row["interaction"]["values"] == pytest.approx([-0.03, -0.07])
    assert row["interaction"]["mean"] == pytest.approx(-0.05)
    half = student_t(1, 0.95) * math.sqrt(2) * 0.02 / math.sqrt(2)
    assert row["interaction"]["half_width"] == pytest.approx(half, rel=1e-5)
    assert row["plain"]["told_apart"]
    assert not row["bn"]["told_apart"]
    bn = summary["bn"][0]
    assert bn["test"]["mean"] == pytest.approx(0.1)
    assert bn["gap"]["mean"] == pytest.approx(-0.1)  # all training accuracies are 1
    assert points(row["plain"]) == "+4.00 ± 0.00"
    assert points({"mean": -0.00001, "half_width": None}) == "+0.00"


def test_the_rate_is_chosen_by_held_out_images_and_never_one_at_which_a_seed_diverged(tmp_path):
    experiment, parts = planted(tmp_path, {**EVEN, ("bn", 0.0): (0.9, 0.92), ("bn", 0.5): (0.85, 0.87)})
    for seed in range(2):
        # Better on the test set at the rate that is worse on held-out images.
        parts[f"bn-dropout-0-batch-4-seed-{seed}"]["runs"] = [
            run_of(0.03, 0.99, held_out=0.5),
            run_of(0.1, 0.70 + seed / 10, held_out=0.6, train_accuracy=0.9),
        ]
        parts[f"plain-dropout-0-batch-4-seed-{seed}"]["runs"] = [
            run_of(0.03, 0.99, held_out=0.9) if seed else run_of(0.03, 0, diverged=7),
            run_of(0.1, 0.5),
        ]
        parts[f"plain-dropout-0.5-batch-16-seed-{seed}"]["runs"] = [
            run_of(rate, 0, diverged=3) for rate in (0.03, 0.1)
        ]
    summary = summarize(experiment, parts)
    cells = {(c["kind"], c["dropout"], c["batch_size"]): c for c in summary["cells"]}
    assert cells["bn", 0.0, 4]["rate"] == 0.1
    assert cells["bn", 0.0, 4]["test"] == pytest.approx([0.7, 0.8])
    assert cells["bn", 0.0, 4]["gap"] == pytest.approx([0.2, 0.1])
    assert cells["plain", 0.0, 4]["rate"] == 0.1
    assert cells["plain", 0.0, 4]["rates"][0] == {"rate": 0.03, "diverged": 1, "held_out": None}
    assert cells["plain", 0.5, 16]["rate"] is None
    lost = summary["dropout"][1]
    assert (lost["plain"], lost["interaction"]) == (None, None)
    assert points(lost["plain"]) == "all rates diverged"
    assert spread(None, str) == "diverged"
    assert "batch 16: all rates diverged" in claims(summary)[0].ours
    assert write_report(summary, tmp_path, {}).exists()


def test_every_network_sees_as_many_examples(tmp_path):
    experiment = Regularization(out=tmp_path)
    for batch_size in experiment.batch_sizes:
        assert experiment.steps(batch_size) * batch_size == 10 * 1024
        assert experiment.rate_at(0.1, batch_size, 0) == pytest.approx(0.1 * batch_size / 32)
        half = experiment.steps(batch_size) // 2
        assert experiment.rate_at(0.1, batch_size, half) == pytest.approx(0.05 * batch_size / 32)
    total = sum(num_steps(experiment, name) for name in names(experiment))
    assert total == 4 * 3 * 2 * 3 * 10_240 * (1 / 4 + 1 / 16 + 1 / 64 + 1 / 256)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dropouts": (0.25, 0.5)}, "0, with which they are compared"),
        ({"dropouts": (0.0, 1.0)}, "at least 0 and below 1"),
        ({"dropouts": (0.0, 0.0)}, "different from each other"),
        ({"batch_sizes": (1, 16)}, "at least 2 for batch statistics, got 1"),
        ({"batch_sizes": (5,)}, "must divide examples 32, so that all networks see as many; 5 does not"),
        ({"rates": (0.0,)}, "rates must be positive"),
        ({"held_out": 0}, "held_out must be at least 1"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_are_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        small(tmp_path, **change)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    experiment = small(tmp_path_factory.mktemp("regularization"))
    (experiment.out / "jobs").mkdir()
    parts = {}
    for name, arguments in names(experiment).items():
        run_part(*arguments)
        parts[name] = json.loads(path_of(experiment.out, name).read_text())
    return summarize(experiment, parts)


def test_chromium_shows_the_page_without_error_or_request(browser, summary, tmp_path):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    page = write_report(summary, tmp_path, {"torch": "2"})
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["accuracy.png", "gain.png", "gap.png"]
    browser.get(page.as_uri())
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map("
        "  p => p.querySelectorAll('.scatterlayer .trace').length)"
    )
    # A curve and the two edges of its band, for two kinds at one dropout, and at two.
    assert shown == [6, 12, 12]
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]
