"""Section 3.3's equations: what is measured, what eps must do, and what training makes of it."""

import json
import math

import numpy as np
import pytest
import torch
from browsing import requests_of

from batchnorm.data import load, to_input
from batchnorm.reproduce.invariance import Invariance
from batchnorm.reproduce.invariance.equations import (
    Layer,
    agreement,
    measure,
    predicted,
    try_layer,
)
from batchnorm.reproduce.invariance.experiment import EQUATIONS
from batchnorm.reproduce.invariance.job import equations, names, num_steps, train
from batchnorm.reproduce.invariance.page import claims, write_report
from batchnorm.reproduce.invariance.summary import spread_of_rates, summarize
from batchnorm.reproduce.parts import plain


@pytest.fixture(scope="module")
def digits():
    return load("digits", progress=False)


def small(out, **changes) -> Invariance:
    settings = {"seeds": 1, "decades": 1, "examples": 12, "prior_steps": 4, "steps": 20, "rates": (0.5, 2.0)}
    return Invariance(**{**settings, "init_stds": (0.01, 0.1), "out": out, **changes})


def fc() -> Layer:
    return Layer(torch.rand(9, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64))


def conv() -> Layer:
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    return Layer(torch.rand(4, 2, 5, 5, dtype=torch.float64), weight)


def cotangent_of(layer: Layer) -> torch.Tensor:
    return torch.randn(layer.apply(layer.inputs, layer.weight).shape, dtype=torch.float64)


@pytest.mark.parametrize("make", [fc, conv], ids=["fc", "conv"])
@pytest.mark.parametrize(("a", "eps"), [(1.0, 0.0), (1.0, 1e-2), (0.03, 1e-5), (50.0, 1e-3)])
def test_what_is_calculated_is_what_autograd_says(make, a, eps):
    torch.manual_seed(1)
    layer = make()
    dy = cotangent_of(layer)
    u, weight = layer.inputs.clone().requires_grad_(), (a * layer.weight).requires_grad_()
    x = layer.apply(u, weight)
    around = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x, around, correction=0, keepdim=True)
    y = (x - mean) / (var + eps).sqrt()
    du, dw = torch.autograd.grad(y, (u, weight), dy)
    expected = {"output": y.detach(), "input": du, "weight": a * dw}
    for found in (predicted(layer, dy, a, eps), measure(layer, dy, a, eps, torch.float64)):
        for name in EQUATIONS:
            torch.testing.assert_close(getattr(found, name), expected[name], rtol=1e-10, atol=1e-12)


def test_deviations_are_relative_to_the_other():
    base = predicted(fc(), cotangent_of(fc()), 1.0, 0.0)
    doubled = type(base)(2 * base.output, 1.5 * base.input, base.weight)
    assert doubled.deviations(base) == pytest.approx({"output": 1.0, "input": 0.5, "weight": 0.0})
    assert not doubled.same_bits(base)
    assert base.same_bits(base)


def test_equations_hold_without_eps_and_as_calculated_with_it():
    layer = conv()
    found = try_layer(layer, [0.1, 1.0, 10.0], 1e-3, seed=3)
    for kernel in ("reference", "torch", "cpu"):
        if f"float64/{kernel}" in found["refused"]:
            continue
        for name in EQUATIONS:
            exact = found["deviations"][f"float64/{kernel}/0"][name]
            assert exact[1] == 0.0
            assert max(exact) < 1e-12
            with_eps = found["deviations"][f"float64/{kernel}/eps"][name]
            assert with_eps == pytest.approx(found["predicted"][name], rel=1e-6, abs=1e-12)
            assert max(found["deviations"][f"float32/{kernel}/0"][name]) < 1e-4
        assert found["powers_of_two"][f"float32/{kernel}"] == 8
    assert 0 < found["agreement"] < 1e-8
    # The output of a channel with deviation σ shrinks to the share s of it, so that the rest is 1 − s.
    sigma = layer.apply(layer.inputs, layer.weight).transpose(0, 1).flatten(1).std(1, correction=0)
    share = (1 + 1e-3 / (0.01 * sigma**2)) ** -0.5 / (1 + 1e-3 / sigma**2) ** -0.5
    assert 1 - share.max() <= found["predicted"]["output"][0] <= 1 - share.min()


def test_agreement_is_the_worst_of_all():
    right = {name: [0.5, 0.0, 0.25] for name in EQUATIONS}
    off = {**right, "input": [0.5, 0.0, 0.3]}
    given = {
        "float64/cpu/eps": off,
        "float64/torch/eps": right,
        "float32/cpu/eps": {**right, "input": [9, 9, 9]},
    }
    assert agreement({"deviations": given, "predicted": right}) == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["fc", "conv"])
def test_layers_are_those_of_networks_before_and_after_training(digits, tmp_path, kind):
    images = to_input(torch.from_numpy(digits.train_images), binarize=True)[:200]
    labels = torch.from_numpy(digits.train_labels)[:200]
    found = equations(small(tmp_path), digits, images, labels, kind, seed=0)
    assert set(found) == {"initial", "trained"}
    assert found["initial"]["deviation"] != found["trained"]["deviation"]
    for state in found.values():
        assert state["agreement"] < 1e-6
        assert len(state["predicted"]["output"]) == 5


def test_growth_is_the_sum_of_squared_steps_with_bn_alone(digits, tmp_path):
    images = to_input(torch.from_numpy(digits.train_images), binarize=True).flatten(1)
    labels = torch.from_numpy(digits.train_labels)
    with_bn, plain_net = (
        train(small(tmp_path), images, labels, normalize, 0.5, 0.1, seed=0) for normalize in (True, False)
    )
    for grown, taken in zip(with_bn["growth"], with_bn["steps_taken"], strict=True):
        assert grown == pytest.approx(taken, rel=5e-3)
    assert max(map(abs, with_bn["cosine"])) < 1e-4 < max(map(abs, plain_net["cosine"]))
    small_weights = train(small(tmp_path), images, labels, True, 0.5, 0.01, seed=0)
    assert small_weights["gradient"][0] / with_bn["gradient"][0] == pytest.approx(10, rel=0.02)
    assert small_weights["weight"][0] * 10 == pytest.approx(with_bn["weight"][0], rel=1e-5)


@pytest.fixture
def parts(tmp_path):
    """Parts made up so that every figure can be counted by hand."""
    experiment = small(tmp_path, seeds=2)
    found = {}
    for name, (_, _, what, kind, seed) in names(experiment).items():
        if what == "equations":
            state = {
                "deviations": {
                    f"{dtype}/{kernel}/{eps}": {
                        equation: [1e-8 * (seed + 1) * (1 if eps == "0" else 1e6), 1e-9, 0.0, 1e-9, 1e-9]
                        for equation in EQUATIONS
                    }
                    for dtype in ("float64", "float32", "bfloat16")
                    for kernel in ("reference", "cpu")
                    for eps in ("0", "eps")
                },
                "predicted": {equation: [1e-2, 1e-9, 0.0, 1e-9, 1e-9] for equation in EQUATIONS},
                "powers_of_two": {
                    f"{dtype}/{kernel}": 8 - seed
                    for dtype in ("float64", "float32", "bfloat16")
                    for kernel in ("reference", "cpu")
                },
                "agreement": 1e-9 * (seed + 1),
                "deviation": [0.1, 0.2, 0.3],
                "refused": {},
            }
            found[name] = {"initial": state, "trained": state}
        else:
            found[name] = {
                "runs": [
                    {
                        "rate": rate, "init_std": std, "step": [0, 1, 20], "loss": [2.0, 1.0, 0.5],
                        "weight": [100 * std, 100 * std, 10.0], "gradient": [1 / std, 1.0, 0.5],
                        "cosine": [0.0, -0.01 * (kind == "plain"), 0.0], "growth": [2.0, 2.02, 1.98],
                        "steps_taken": [2.0, 2.0, 2.0], "final_loss": 0.4 + seed, "final_accuracy": 0.9,
                    }
                    for rate in experiment.rates for std in experiment.init_stds
                ]
            }  # fmt: skip
    return experiment, found


def test_summaries_take_the_worst_of_seeds_and_layers(parts):
    experiment, found = parts
    summary = summarize(experiment, found)
    assert summary["agreement"] == 2e-9
    assert summary["exact"]["float32/cpu"]["output"] == 2e-8
    assert summary["exact"]["float32/cpu"]["powers_of_two"] == 4 * (8 + 7)
    assert summary["exact"]["float32/cpu"]["powers_tried"] == 64
    assert summary["training"]["bn"][0]["growth_over_steps"] == pytest.approx([0.99, 1.01])
    assert summary["training"]["plain"][0]["cosine"] == 0.01
    # Effective rates from 0.01 and 0.1: 100 times apart at first, equal at last.
    assert spread_of_rates(summary["training"]["bn"], 0.5) == pytest.approx((100.0, 1.0))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_verdicts_follow_the_numbers(parts):
    experiment, found = parts
    summary = summarize(experiment, found)
    verdicts = [claim.verdict for claim in claims(summary)]
    # In float64 the made-up equations are off by 2e-8; eps, growth and rates are as they should be.
    assert verdicts == ["misses"] * 3 + ["partly", "holds", "holds", "holds"]
    for row in summary["exact"].values():
        row.update(dict.fromkeys(EQUATIONS, 1e-13))
    assert [claim.verdict for claim in claims(summary)][:3] == ["holds"] * 3
    for row in summary["training"]["bn"]:
        row["effective"] = [[1.0 / row["init_std"], 1.0, 5.0 / row["init_std"]]]
        row["growth_over_steps"] = [-1.0, 1.0]
        row["gradient"] = [[1.0, 1.0, 1.0]]
    assert [claim.verdict for claim in claims(summary)][4:] == ["misses"] * 3


def test_steps_add_up(tmp_path):
    experiment = small(tmp_path)
    assert sum(num_steps(experiment, name) for name in names(experiment)) == 2 * 4 + 2 * 4 * 20
    assert experiment.scales == pytest.approx([0.1, math.sqrt(0.1), 1, math.sqrt(10), 10])
    assert experiment.scales[2] == 1.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decades": 0}, "decades must be at least 1"),
        ({"eps": 0.0}, "eps must be positive, got 0.0: 0 is tested in any case"),
        ({"examples": 1}, "examples must be at least 2"),
        ({"init_stds": (0.1, 0.1)}, "init_stds must be at least one, and different"),
        ({"rates": (1.0,)}, "headline_rate 0.5 is not one of the rates"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_are_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        small(tmp_path, **change)


def test_chromium_shows_the_page_without_error_or_request(browser, parts, tmp_path):
    experiment, found = parts
    page = write_report(plain(summarize(experiment, found)), tmp_path, {"torch": "2"})
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["effective-rate.png", "eps.png", "equations.png", "weights.png"]
    browser.get(page.as_uri())
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map("
        "  p => p.querySelectorAll('.scatterlayer .trace').length)"
    )
    # Six curves of dtypes; four layers and the calculation, for each equation; two deviations of two kinds,
    # with band edges.
    assert shown == [6, 5, 5, 5, 12, 12, 12]
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]
    assert np.isfinite(summarize(experiment, found)["agreement"])
