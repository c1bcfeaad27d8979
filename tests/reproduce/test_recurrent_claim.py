"""Sequential digits: sequences are the images, gradients are autograd's, and verdicts follow the numbers."""

import json
import math

import numpy as np
import pytest
import torch
from browsing import requests_of
from torch import nn

from batchnorm.data import ImageData
from batchnorm.layers import BatchNormLSTM
from batchnorm.reproduce.parts import plain
from batchnorm.reproduce.recurrent import Recurrent
from batchnorm.reproduce.recurrent.charts import accuracy_chart, gradient_chart
from batchnorm.reproduce.recurrent.job import accuracy, names, num_steps, run_part, train
from batchnorm.reproduce.recurrent.network import Reader, gradients_through_time, initial_state, sequences
from batchnorm.reproduce.recurrent.page import accuracy_table, claims, gradient_table, write_report
from batchnorm.reproduce.recurrent.summary import middle_of, steps_to, summarize
from batchnorm.reproduce.training import path_of


def small(out, **changes) -> Recurrent:
    settings = {"seeds": 2, "hidden_size": 6, "row_steps": 4, "pixel_steps": 2, "evaluations": 2}
    sizes = {"pixel_side": 2, "test_examples": 30, "batch_size": 8, "gammas": (0.1, 1.0)}
    return Recurrent(**{**settings, **sizes, "out": out, **changes})


def data(height: int = 4, width: int = 4) -> ImageData:
    images = np.arange(3 * height * width, dtype=np.uint8).reshape(3, height, width)
    labels = np.array([0, 1, 0])
    return ImageData("made", images, labels, images, labels, ("a", "b"))


def test_rows_and_pixels_are_the_images_from_the_top_left():
    images = torch.from_numpy(data().train_images).float() / 255
    rows = sequences(data(), "train", "rows", 2)
    assert rows.shape == (4, 3, 4)
    torch.testing.assert_close(rows[1, 2], images[2, 1])
    pixels = sequences(data(), "test", "pixels", 4)
    assert pixels.shape == (16, 3, 1)
    torch.testing.assert_close(pixels[:, 1, 0], images[1].flatten())
    averaged = sequences(data(), "test", "pixels", 2)
    assert averaged.shape == (4, 3, 1)
    torch.testing.assert_close(averaged[1, 0, 0], images[0, :2, 2:].mean())
    with pytest.raises(ValueError, match="pixel_side 3 does not divide images of 4 by 4"):
        sequences(data(), "train", "pixels", 3)
    colour = np.zeros((3, 3, 4, 4), dtype=np.uint8)
    labels = np.array([0, 1, 0])
    with pytest.raises(ValueError, match="colour"):
        sequences(ImageData("made", colour, labels, colour, labels, ("a", "b")), "train", "rows", 2)


def test_both_networks_start_from_the_same_weights():
    plain, normalized = (Reader(3, 5, 4, 2, gamma, seed=7) for gamma in (None, 0.1))
    assert type(plain.lstm) is nn.LSTM
    assert isinstance(normalized.lstm, BatchNormLSTM)
    assert normalized.lstm.max_length == 5
    found = dict(normalized.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, found[name]), name
    gate = plain.lstm.weight_hh_l0[4:8].detach()
    torch.testing.assert_close(gate @ gate.T, torch.eye(4), atol=1e-5, rtol=0)
    assert plain.lstm.bias_ih_l0.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 8
    assert not plain.lstm.bias_hh_l0.any()
    state = torch.get_rng_state()
    Reader(3, 5, 4, 2, None, seed=7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gamma", [None, 0.5], ids=["plain", "bn"])
def test_gradients_through_time_are_autograds(gamma):
    net = Reader(3, 4, 5, 2, gamma, seed=1).double()
    x, labels = torch.randn(4, 6, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 0, 1])
    begun = tuple(part.double() for part in initial_state(6, 5, 0.3, torch.Generator().manual_seed(2)))
    loss, norms = gradients_through_time(net, x, labels, begun)
    assert loss == pytest.approx(nn.functional.cross_entropy(net(x, begun), labels).item())

    def from_step(step, h, c):
        """The loss as a function of the state after ``step`` steps."""
        for later in range(step, 4):
            _, (h, c) = net.lstm(x[later][None], (h, c), **({} if gamma is None else {"first_step": later}))
        return nn.functional.cross_entropy(net.classify(h[0]), labels)

    h, c = begun
    for step in range(4):
        with torch.no_grad():
            _, (h, c) = net.lstm(x[step][None], (h, c), **({} if gamma is None else {"first_step": step}))
        at = h.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(from_step(step + 1, at, c), at)
        assert norms[step] == pytest.approx(gradient.norm().item(), rel=1e-9)


def test_accuracy_is_by_running_statistics_and_leaves_the_mode():
    net = Reader(3, 4, 5, 2, 0.1, seed=1)
    x = torch.randn(4, 1001, 3)
    before = [b.clone() for b in net.buffers()]
    right = net.eval()(x).argmax(1)
    net.train()
    labels = right.clone()
    labels[:91] = 1 - labels[:91]
    assert accuracy(net, x, labels) == pytest.approx(910 / 1001)
    assert net.training
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))


def test_a_network_learns_and_repeats_itself(tmp_path):
    settings = {"row_steps": 60, "tasks": ("rows",), "evaluations": 3}
    experiment = small(tmp_path, hidden_size=20, batch_size=32, rate=0.003, **settings)
    found = train(experiment, "rows", "bn-0.1", 0.003, 0)
    assert found["steps"] == [20, 40, 60]
    assert found["final"] > 0.5
    assert found["loss"][-1] < 0.7 * found["loss"][0]
    assert [len(point["norms"]) for point in found["gradients"]] == [28, 28]
    again = train(experiment, "rows", "bn-0.1", 0.003, 0)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_a_network_that_is_not_finite_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda z, _: z.sum() * math.nan)
    found = train(small(tmp_path), "rows", "plain", 0.1, 0)
    assert found["final"] is None
    assert len(found["gradients"]) == 1


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    experiment = small(tmp_path_factory.mktemp("recurrent"))
    (experiment.out / "jobs").mkdir()
    parts = {}
    for name, arguments in names(experiment).items():
        run_part(*arguments)
        parts[name] = json.loads(path_of(experiment.out, name).read_text())
    assert len(parts) == 2 * 5 * 2
    assert num_steps(experiment, "pixels-plain-rate-0.001-seed-0") == 2
    return summarize(experiment, parts)


def test_the_whole_says_what_was_measured(summary):
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    networks = summary["tasks"]["rows"]["networks"]
    assert [(one["kind"], one["rate"]) for one in networks] == [
        ("plain", 0.001), ("plain", 0.0001), ("plain", 0.0003), ("bn-0.1", 0.001), ("bn-1", 0.001)
    ]  # fmt: skip
    for one in networks:
        assert np.shape(one["accuracy"]) == (2, 2)
        assert len(one["gradients"][0]["norms"]) == 28
        first, last = np.array([p["norms"] for p in one["gradients"]])[0][[0, -1]]
        assert min(one["gradients"][0]["ratio"]) <= first / last * 1.5
    assert len(summary["tasks"]["pixels"]["networks"][0]["gradients"][0]["norms"]) == 4
    assert len(claims(summary)) == 6


def changed(summary, **of_networks):
    """The summary with other figures of the networks of rows, by kind and rate."""
    other = json.loads(json.dumps(summary))
    for one in other["tasks"]["rows"]["networks"]:
        key = f"{one['kind']}@{one['rate']:g}".replace("-", "_").replace(".", "_").replace("@", "_at_")
        one.update(of_networks.get(key, {}))
    return other


def test_targets_are_the_plain_networks_best(tmp_path):
    def part(accuracies, final=0.5):
        point = {"loss": 1.0, "norms": [1.0, 2.0]}
        return {
            "steps": [10, 20], "accuracy": accuracies, "loss": [1.0, 1.0], "final": final,
            "gradients": [point, point], "seconds": 1.0,
        }  # fmt: skip

    experiment = small(tmp_path, tasks=("rows",), plain_rates=(0.01,), gammas=(0.1,))
    parts = {
        "rows-plain-rate-0.001-seed-0": part([0.4, 0.3]),
        "rows-plain-rate-0.001-seed-1": part([0.1, 0.2]),
        "rows-plain-rate-0.01-seed-0": part([0.5, 0.6]),
        "rows-plain-rate-0.01-seed-1": part([0.2, 0.4]),
        "rows-bn-0.1-rate-0.001-seed-0": part([0.35, 0.9], 0.9),
        "rows-bn-0.1-rate-0.001-seed-1": part([0.2, 0.29], 0.8),
    }
    found = summarize(experiment, plain(parts))
    task = found["tasks"]["rows"]
    assert task["best_rate"] == 0.01
    assert task["targets"] == {"plain": 0.2, "plain_at_best": 0.4}
    normalized = task["networks"][-1]
    assert normalized["steps_to"] == {"plain": [10, 10], "plain_at_best": [20, None]}
    assert normalized["gradients"][0]["ratio"] == [0.5, 0.5]
    shown = accuracy_table(found, "rows").rows[-1]
    assert shown[2] == "85.0 ± 7.1"
    assert shown[3] == "10 (10, 10)"
    assert shown[4] == "20 (20, never)"


def test_steps_to_a_target():
    assert steps_to([5, 10, 15], [0.1, None, 0.4], 0.3) == 15
    assert steps_to([5, 10], [0.1, 0.2], 0.3) is None
    assert middle_of([3, None, 1]) == 3
    assert middle_of([None, None, 1]) is None
    assert middle_of([4, 2]) == 2


def test_verdicts_follow_the_numbers(summary):
    best = summary["tasks"]["rows"]["best_rate"]
    at_best = f"plain_at_{best:g}".replace(".", "_")

    def verdicts(ours, theirs, final, plain_final, ratio, larger):
        point = [{"step": 0, "loss": [1.0], "norms": [1.0], "ratio": [ratio]}]
        other = [{"step": 0, "loss": [1.0], "norms": [1.0], "ratio": [larger]}]
        both = {"plain": theirs, "plain_at_best": theirs}
        figures = {
            "plain_at_0_001": {"steps_to": both},
            "bn_0_1_at_0_001": {
                "steps_to": {"plain": ours, "plain_at_best": ours}, "final": final, "gradients": point
            },
            "bn_1_at_0_001": {"gradients": other},
        }  # fmt: skip
        figures[at_best] = {**figures.get(at_best, {}), "steps_to": both, "final": plain_final}
        return [claim.verdict for claim in claims(changed(summary, **figures))[:3]]

    assert verdicts([1, 1], [2, 2], [0.9, 0.9], [0.5, 0.51], 0.9, 1e5) == ["holds"] * 3
    assert verdicts([2, 2], [2, 2], [0.5, 0.6], [0.5, 0.58], 1e-3, 1e5) == ["misses", "partly", "partly"]
    assert verdicts([None, None], [2, 2], [None, 0.6], [0.5, 0.5], 1e-3, 0.5)[:] == ["misses"] * 3
    assert verdicts([1, 1], [2, 2], [0.4, 0.4], [0.5, 0.5], 0.5, 0.9) == ["holds", "misses", "partly"]


def test_curves_and_tables_are_the_summarys(summary):
    chart = accuracy_chart(summary, "rows")
    networks = summary["tasks"]["rows"]["networks"]
    assert [curve.name for curve in chart.curves][-2:] == ["BN-LSTM, γ from 0.1", "BN-LSTM, γ from 1"]
    np.testing.assert_allclose(chart.curves[3].runs, networks[3]["accuracy"])
    before = gradient_chart(summary, "rows", 0)
    assert [curve.name for curve in before.curves] == ["LSTM", "BN-LSTM, γ from 0.1", "BN-LSTM, γ from 1"]
    norms = np.array(networks[3]["gradients"][0]["norms"])
    np.testing.assert_allclose(before.curves[1].runs[0], norms / norms[-1])
    rows = gradient_table(summary, "rows").rows
    assert len(rows) == 10
    assert rows[0][:2] == ("LSTM, rate 0.001", "0")


def test_the_page_opens_offline_and_shows_every_chart(summary, tmp_path, browser):
    page = write_report(summary, tmp_path, {"python": "3.11"})
    for task in ("rows", "pixels"):
        for name in ("accuracy", "gradients-before", "gradients-after"):
            assert (tmp_path / f"{task}-{name}.png").stat().st_size > 10_000
    browser.get(page.as_uri())
    assert "Recurrent batch normalization" in browser.title
    assert len(browser.find_elements("css selector", ".js-plotly-plot")) == 6
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert requests_of(browser) in ([], [page.as_uri()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"tasks": ("words",)}, "rows, pixels, got 'words'"),
        ({"gammas": ()}, "gammas must be at least one"),
        ({"gammas": (0.0,)}, "gammas must be positive"),
        ({"plain_rates": (0.001,)}, "beside rate 0.001"),
        ({"batch_size": 1}, "at least 2"),
        ({"rate": 0.0}, "rate must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"noise": -0.1}, "noise must be zero or more"),
        ({"noise": math.nan}, "noise must be zero or more"),
        ({"evaluations": 3}, "at most the steps, 2 for pixels, got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)


def test_no_further_rate_is_a_choice(tmp_path):
    assert small(tmp_path, plain_rates=()).networks()[0] == ("plain", 0.001)
    assert len(small(tmp_path, plain_rates=()).networks()) == 3
