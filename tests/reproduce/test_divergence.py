"""Section 2: statistics outside the gradient do what the section's algebra says, and are told apart."""

import json
import math

import pytest
import torch
from browsing import requests_of
from torch import nn

from batchnorm.data import load
from batchnorm.layers import BatchNorm1d
from batchnorm.reproduce.claiming import science
from batchnorm.reproduce.divergence import Divergence
from batchnorm.reproduce.divergence.experiment import KINDS
from batchnorm.reproduce.divergence.job import bias_alone, names, num_steps, run_part, train
from batchnorm.reproduce.divergence.layers import Normalize, network
from batchnorm.reproduce.divergence.page import claims, span, write_report
from batchnorm.reproduce.divergence.summary import CHANCE_LOSS, blown_up, exponent, summarize
from batchnorm.reproduce.parts import do_parts, keep, log_grid, plain
from batchnorm.reproduce.training import path_of


@pytest.fixture(scope="module")
def digits():
    return load("digits", progress=False)


def small(out, **changes) -> Divergence:
    settings = {"seeds": 1, "rates": (1.0, 3.0), "steps": 20, "bias_steps": 20, "bias_examples": 200}
    return Divergence(**{**settings, "out": out, "processes": 1, **changes})


@pytest.mark.parametrize("scales", [False, True], ids=["mean", "mean and deviation"])
def test_outside_the_gradient_statistics_are_constants(scales):
    x = (torch.randn(7, 3, dtype=torch.float64) * 2 + 5).requires_grad_()
    dy = torch.randn(7, 3, dtype=torch.float64)
    kind = KINDS["both-outside" if scales else "mean-outside"]
    y = Normalize(3, kind, eps=0.0).double()(x)
    std = x.std(0, unbiased=False) if scales else torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(y, (x - x.mean(0)) / std)
    y.backward(dy)
    torch.testing.assert_close(x.grad, (dy / std).detach())


def test_inside_the_gradient_a_shift_of_all_examples_has_gradient_zero():
    b = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 3, dtype=torch.float64)
    y = Normalize(3, KINDS["mean-inside"]).double()(x + b)
    y.backward(torch.randn(7, 3, dtype=torch.float64))
    torch.testing.assert_close(b.grad, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_moving_averages_start_at_0_and_1_and_normalize_after_they_moved():
    layer = Normalize(1, KINDS["moving-outside"], eps=0.0, new_weight=0.25)
    y = layer(torch.tensor([[2.0], [6.0]]))  # mean 4, biased variance 4
    assert (layer.mean.item(), layer.var.item()) == (1.0, 1.75)
    torch.testing.assert_close(y, torch.tensor([[1.0], [5.0]]) / math.sqrt(1.75))


def test_every_kind_has_the_same_weights_and_biases_and_algorithm_1_is_our_layer():
    settings = {"in_features": 5, "classes": 3, "activation": "relu", "init_std": 0.1, "seed": 3}
    nets = {name: network(kind, **settings, new_weight=0.1) for name, kind in KINDS.items()}
    first = nets["mean-outside"][1]
    assert isinstance(first, nn.Linear)
    for net in nets.values():
        torch.testing.assert_close(net[1].weight, first.weight, rtol=0, atol=0)
        assert not net[1].bias.any()
        assert [type(child).__name__ for child in net[3::3]] == ["ReLU"] * 3
    assert sum(isinstance(child, BatchNorm1d) for child in nets["algorithm-1"]) == 3
    assert nets["both-outside"][2].weight is None
    assert nets["affine-outside"][2].weight.tolist() == [1.0] * 100


@pytest.mark.parametrize("scales", [False, True], ids=["mean", "mean and deviation"])
def test_a_bias_alone_goes_straight_on_and_nothing_else_moves(digits, tmp_path, scales):
    found = bias_alone(small(tmp_path), digits, 3.0, seed=1, scales=scales, dtype="float64")
    assert found["step"] == [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20]
    assert found["bias"][-1] == pytest.approx(3.0 * 20 * found["first_gradient"], rel=1e-12)
    assert found["bias"][-1] > 1
    assert max(found["off_line"]) < 1e-13
    assert 0 < max(found["moved"]) < 1e-13
    assert max(found["roundings"]) <= 1
    assert max(map(abs, found["loss"])) < 1e-13


def test_networks_train_inside_the_gradient_and_not_outside(digits, tmp_path):
    experiment = small(tmp_path, steps=100)
    inside = train(experiment, digits, "algorithm-1", "sigmoid", 3.0, seed=0)
    outside = train(experiment, digits, "both-outside", "sigmoid", 3.0, seed=0)
    assert inside["largest_bias"] < 1e-4 < 1 < outside["largest_bias"]
    assert inside["final_loss"] < 1 < CHANCE_LOSS < outside["final_loss"]
    assert inside["step"][-1] == 100
    assert outside["growth"] > 2 > inside["growth"]
    overflow = train(experiment, digits, "mean-outside", "relu", 10.0, seed=0)
    assert overflow["not_finite"] is not None
    assert overflow["grown"] <= overflow["not_finite"]
    assert overflow["final_loss"] is None


def test_exponent_is_that_of_the_power_law():
    steps = [0, 1, 10, 20, 40, 70, 100]
    assert exponent(steps, [0, 50, *(3 * s**0.5 for s in steps[2:])]) == pytest.approx(0.5)
    assert exponent([0, 1], [0.0, 1.0]) is None
    assert exponent(steps, [None] * 7) is None


def test_blown_up_is_not_finite_or_worse_than_knowing_nothing():
    assert blown_up({"final_loss": [None, 2.4, 2.2, 0.1]}) == 2


def test_grids_and_spans():
    assert log_grid(100, per_decade=2) == [0, 1, 3, 10, 32, 100]
    assert log_grid(1) == [0, 1]
    assert span([0.5, None, 0.25], "{:.2f}") == "0.25–∞"
    assert span([0.5, 0.5], "{:.2f}") == "0.50"
    assert plain({"a": [math.nan, 1 / 3, 2]}) == {"a": [None, 0.333333, 2]}


def _work(out, name, log):
    with open(log, "a") as file:
        file.write(f"{name}\n")
    keep(out, name, {"value": len(name)})


def test_parts_are_done_once_and_others_settings_refused(tmp_path, capsys):
    out, log = tmp_path / "out", tmp_path / "log"
    parts = {name: (out, name, log) for name in ("a", "bb")}
    given = {"source": "digits", "data_dir": None, "num_steps": len, "processes": 1, "title": "t"}
    found = do_parts(out, {"seeds": 1}, parts, _work, **given)
    assert found == {"a": {"value": 1}, "bb": {"value": 2}}
    (out / "jobs" / "a.json").write_text('{"val')  # cut short
    assert do_parts(out, {"seeds": 1}, parts, _work, **given) == found
    assert log.read_text().split() == ["a", "bb", "a"]
    assert "1 of 2 parts are already done" in capsys.readouterr().err
    with pytest.raises(ValueError, match="other settings"):
        do_parts(out, {"seeds": 2}, parts, _work, **given)


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    experiment = small(tmp_path_factory.mktemp("divergence"), steps=60)
    (experiment.out / "jobs").mkdir()
    parts = {}
    for name, arguments in names(experiment).items():
        run_part(*arguments)
        parts[name] = json.loads(path_of(experiment.out, name).read_text())
    return summarize(experiment, parts)


def test_the_whole_says_what_was_measured(summary, tmp_path):
    verdicts = {claim.text.split(",")[0].rstrip("."): claim for claim in claims(summary)}
    assert verdicts["The gradient step moves b"].verdict == "holds"
    assert verdicts["Output and loss do not change"].verdict == "holds"
    assert verdicts["With Algorithm 1 the gradient does not move b"].verdict == "holds"
    experiment = small(tmp_path)
    assert set(names(experiment)) == {"bias-seed-0"} | {
        f"{kind}-{activation}-seed-0" for kind in KINDS for activation in ("sigmoid", "relu")
    }
    assert sum(num_steps(experiment, name) for name in names(experiment)) == 2 * 2 * 2 * 20 + 12 * 2 * 20
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_verdicts_follow_the_numbers(summary):
    def verdicts(**kinds):
        changed = {**summary, "networks": dict(summary["networks"])}
        for activation in ("sigmoid", "relu"):
            for kind in KINDS:
                losses = kinds.get(kind.replace("-", "_"), 1.0)
                changed["networks"][f"{activation}/{kind}"] = [
                    {**row, "final_loss": [losses], "not_finite": [7 if losses is None else None]}
                    for row in summary["networks"][f"{activation}/{kind}"]
                ]
        return [claim.verdict for claim in claims(changed)][2:]

    assert verdicts() == ["misses", "misses", "holds", "holds"]
    assert verdicts(both_outside=5.0) == ["partly", "holds", "holds", "holds"]
    assert verdicts(both_outside=None) == ["holds", "holds", "holds", "holds"]
    assert verdicts(both_outside=None, mean_outside=None) == ["holds", "misses", "holds", "holds"]
    assert verdicts(algorithm_1=5.0)[-1] == "partly"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"rates": (1.0, 1.0)}, "rates must be at least one, and different"),
        ({"rates": (1.0, -1.0)}, "rates must be positive"),
        ({"rates": (0.5,)}, r"headline_rate 1.0 is not one of the rates \(0.5,\)"),
        ({"activations": ("tanh",)}, "activations must be of sigmoid, relu, got 'tanh'"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"init_std": 0.0}, "init_std must be positive"),
        ({"moving_weight": 0.0}, "moving_weight must be above 0"),
        ({"processes": 0}, "processes must be at least 1"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_are_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        small(tmp_path, **change)


def test_chromium_shows_the_page_without_error_or_request(browser, summary, tmp_path):
    page = write_report(summary, tmp_path, {"torch": "2", "settings": science(small(tmp_path))})
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "bias.png",
        "relu-bias.png",
        "relu-loss.png",
        "sigmoid-bias.png",
        "sigmoid-loss.png",
    ]
    browser.get(page.as_uri())
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map("
        "  p => p.querySelectorAll('.scatterlayer .trace').length)"
    )
    # Two quantities of two kinds; six kinds of one seed each.
    assert shown == [4, 6, 6, 6, 6]
    assert "Algorithm 1 trains at the same rates" in browser.find_element("tag name", "table").text
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]


def test_summaries_take_each_kind_rate_and_seed_from_its_part(summary, tmp_path):
    experiment = small(tmp_path, seeds=2)
    parts = {}
    for number, name in enumerate(names(experiment)):
        run = {
            "step": [0, 1],
            "loss": [1.0, 1.0],
            "bias": [0.0, 1.0],
            "weight": [1.0, 1.0],
            "deviation": [1, 1],
        }
        ends = {"not_finite": None, "grown": None, "growth": 1.0, "largest_bias": 1.0, "final_accuracy": 0.5}
        parts[name] = {
            "runs": [{"rate": r, **run, **ends, "final_loss": number + r / 10} for r in experiment.rates]
        }
    for seed in range(2):
        run = {
            "step": [0, 1],
            "bias": [0.0, 1.0],
            "off_line": [0, 0.1 * seed],
            "moved": [0, 0.2],
            "roundings": [0, 0.3],
        }
        parts[f"bias-seed-{seed}"] = {
            "runs": [
                {"scales": s, "dtype": d, "rate": r, "loss": [0.0, -0.5], **run}
                for s in (False, True) for d in ("float32", "float64") for r in experiment.rates
            ]
        }  # fmt: skip
    found = summarize(experiment, parts)
    order = list(names(experiment))
    for kind in KINDS:
        expected = [order.index(f"{kind}-relu-seed-{seed}") + 0.3 for seed in (0, 1)]
        assert found["networks"][f"relu/{kind}"][1]["final_loss"] == pytest.approx(expected)
    assert found["bias_alone"][0]["off_line"] == 0.1
    assert found["bias_alone"][0]["loss_moved"] == 0.5
    assert [row["runs"] for row in found["bias_alone"]] == [4, 4, 4, 4]
