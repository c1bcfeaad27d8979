"""The adaptation experiment: corruptions by value, parts, verdicts that follow the numbers."""

import json
import math

import numpy as np
import pytest
import torch
from browsing import requests_of
from torch import nn

from batchnorm.cli import main
from batchnorm.data import ImageData
from batchnorm.reproduce.adaptation import Adaptation
from batchnorm.reproduce.adaptation import job as jobs
from batchnorm.reproduce.adaptation.corruptions import STRENGTHS, corrupted
from batchnorm.reproduce.adaptation.job import accuracy, adapted, names, num_steps, run_part, train
from batchnorm.reproduce.adaptation.networks import colour_network, grey_network, images_of, in_domain
from batchnorm.reproduce.adaptation.page import (
    blended_table,
    claims,
    shown,
    signed,
    statistics_table,
    stream_table,
    write_report,
)
from batchnorm.reproduce.adaptation.summary import deviation, gains, over_targets, summarize
from batchnorm.reproduce.training import path_of


def small(out, **changes) -> Adaptation:
    settings = {"seeds": 1, "examples": (16, 32), "stream": 96, "stream_batches": (16, 48), "epochs": 1}
    return Adaptation(**{**settings, "out": out, **changes})


# Images.


def test_noise_has_its_deviation_and_is_cut_off():
    grey = torch.full((50, 1, 28, 28), 0.5)
    assert corrupted(grey, "noise", 0.1, 0).std().item() == pytest.approx(0.1, rel=0.02)
    loud = corrupted(grey, "noise", 2.0, 0)
    assert (loud.min(), loud.max()) == (0, 1)
    assert torch.equal(loud, corrupted(grey, "noise", 2.0, 0))
    assert not torch.equal(loud, corrupted(grey, "noise", 2.0, 1))


@pytest.mark.parametrize("deviation", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_is_a_gaussian_of_its_deviation(deviation, channels):
    x = torch.zeros(2, channels, 31, 31)
    x[:, :, 15, 15] = 1
    blurred = corrupted(x, "blur", deviation, 0)[0, -1].double()
    place = torch.arange(31) - 15.0
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)
    gauss = torch.exp(-(place**2) / (2 * deviation**2)).double()
    reach = math.ceil(3 * deviation)
    gauss[place.abs() > reach] = 0
    gauss /= gauss.sum()
    torch.testing.assert_close(blurred, gauss[:, None] * gauss[None, :], rtol=1e-5, atol=1e-7)
    flat = torch.full((1, channels, 9, 9), 0.3)
    torch.testing.assert_close(corrupted(flat, "blur", deviation, 0), flat)  # borders are continued


def test_contrast_inversion_and_rotation_by_hand():
    x = torch.rand(4, 3, 8, 8)
    low = corrupted(x, "contrast", 0.3, 0)
    torch.testing.assert_close(low.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(low.flatten(1).std(1), 0.3 * x.flatten(1).std(1))
    assert torch.equal(corrupted(x, "inversion", 1.0, 0), 1 - x)
    turned = corrupted(x, "rotation", 90.0, 3)
    ways = [torch.rot90(x, turns, (2, 3)) for turns in (1, 3)]
    found = [[torch.allclose(t, way[i], atol=1e-5) for way in ways] for i, t in enumerate(turned)]
    assert all(sum(row) == 1 for row in found)
    assert {row.index(True) for row in found} == {0, 1}  # to either side


def test_usps_is_put_where_mnist_has_its_digits():
    data = ImageData(
        "usps",
        np.full((2, 16, 16), 255, np.uint8),
        np.array([0, 1]),
        np.zeros((1, 16, 16), np.uint8),
        np.array([0]),
        ("0", "1"),
    )
    x = images_of(data, "train")
    assert x.shape == (2, 1, 28, 28)
    torch.testing.assert_close(x[0, 0, 4:24, 4:24], torch.ones(20, 20))
    assert x.sum().item() == pytest.approx(2 * 400)
    assert torch.equal(in_domain(x, "usps", 0), 2 * x - 1)
    torch.testing.assert_close(in_domain(x, "usps inversion 1", 0), 1 - 2 * x)


def test_networks_take_their_images():
    assert grey_network(7)(torch.randn(3, 1, 28, 28)).shape == (3, 7)
    assert colour_network(5)(torch.randn(3, 3, 32, 32)).shape == (3, 5)
    convs = [m for m in colour_network(5).modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 9
    assert sum(p.numel() for p in colour_network(10).parameters()) == 78_042


# Settings and parts.


def test_targets_of_each_source(tmp_path):
    experiment = small(tmp_path, sources=("mnist", "usps", "cifar10"))
    assert experiment.targets("usps") == ["mnist"]
    assert experiment.targets("mnist")[:3] == ["usps", "mnist noise 0.2", "mnist noise 0.4"]
    assert len(experiment.targets("mnist")) == 13
    assert experiment.targets("cifar10") == [
        f"cifar10 {kind} {s:g}" for kind in ("noise", "blur", "contrast") for s in STRENGTHS["colour"][kind]
    ]
    assert small(tmp_path, sources=("mnist",)).targets("mnist")[0] == "mnist noise 0.2"
    assert len(names(experiment)) == 1 + 5 + 1 + 1 + 3
    assert experiment.trained("cifar10") == ["cifar10 noise 0.1", "cifar10 blur 1", "cifar10 contrast 0.3"]
    assert experiment.trained("mnist")[-2:] == ["mnist inversion 1", "mnist rotation 40"]
    assert experiment.trained("usps") == []
    every = small(tmp_path, sources=experiment.sources, trained_there="all")
    assert len(names(every)) == 1 + 12 + 1 + 1 + 9
    assert "usps-seed-0" in names(experiment)
    assert names(experiment)["mnist-noise-0.4-seed-0"][2:] == ("mnist noise 0.4", 0)
    assert num_steps(Adaptation(out=tmp_path), "mnist-noise-0.2-seed-0") == 3 * 468
    assert num_steps(experiment, "usps-seed-0") == 56


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sources": ("svhn",)}, "sources must be of digits, mnist, usps, cifar10, got 'svhn'"),
        ({"sources": ()}, "sources must be at least one"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"examples": (1, 4)}, "at least 2 examples"),
        ({"stream_batches": (200,)}, "stream must be at least a batch, 200, got 96"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_settings_are_refused(tmp_path, change, says):
    with pytest.raises(ValueError, match=says):
        small(tmp_path, **change)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An experiment on digits with one strength of each corruption, its parts, and its summary."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.setitem(STRENGTHS, "grey", {"noise": (0.4,), "blur": (2.5,), "contrast": (0.3,)})
    torch.set_num_threads(1)  # as in each test: another number rounds otherwise
    experiment = small(tmp_path_factory.mktemp("adaptation"), epochs=4)
    (experiment.out / "jobs").mkdir()
    parts = {}
    for name, arguments in names(experiment).items():
        run_part(*arguments)
        parts[name] = json.loads(path_of(experiment.out, name).read_text())
    torch.set_num_threads(threads)
    yield experiment, parts, summarize(experiment, parts)
    patch.undo()


def test_a_network_trains_the_same_each_time_and_is_as_good_as_its_part_says(made):
    experiment, parts, _ = made
    data = jobs._load(experiment, "digits")
    one, other = (train(experiment, data, "digits", 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    x, y = jobs.tested(data, "digits", 0)
    assert accuracy(one, x, y) == pytest.approx(parts["digits-seed-0"]["accuracy"], abs=1e-6)
    assert accuracy(one, x, y) > 0.3
    with torch.no_grad():
        assert accuracy(one, x, y) == (one(x).argmax(1) == y).double().mean().item()


def test_each_adaptation_starts_from_the_source_and_leaves_it(made):
    experiment, parts, _ = made
    model = train(experiment, jobs._load(experiment, "digits"), "digits", 0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = adapted(experiment, model, "digits contrast 0.3", 0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert list(found["runs"]) == [
        "statistics 16", "statistics 32", "blended 1", "blended 16", "blended 32",
        "statistics stream 16", "statistics stream 48", "entropy stream 16", "entropy stream 48",
    ]  # fmt: skip
    expected = parts["digits-seed-0"]["targets"]["digits contrast 0.3"]
    assert found["before"] == pytest.approx(expected["before"], abs=1e-6)
    for name, run in found["runs"].items():
        assert run["accuracy"] == pytest.approx(expected["runs"][name]["accuracy"], abs=1e-6)
    # The same by hand, for one of them.
    x, y = jobs.tested(jobs._load(experiment, "digits"), "digits contrast 0.3", 0)
    images = images_of(jobs._load(experiment, "digits"), "train")
    order = jobs.epoch_order(0, 1438, 3000)
    chosen = in_domain(images[order[:96]], "digits contrast 0.3", 4000)[:32]
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        model(chosen)
    assert accuracy(model.eval(), x, y) == pytest.approx(found["runs"]["statistics 32"]["accuracy"], abs=0.01)


def test_the_summary_is_json_and_holds_every_target(made):
    _experiment, parts, summary = made
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    of = summary["targets"]["digits"]["digits blur 2.5"]
    assert of["there"] == [pytest.approx(parts["digits-blur-2.5-seed-0"]["accuracy"])]
    assert of["before"] == [parts["digits-seed-0"]["targets"]["digits blur 2.5"]["before"]]
    assert gains(summary, "statistics 32")["digits → digits blur 2.5"] == pytest.approx(
        of["runs"]["statistics 32"]["accuracy"][0] - of["before"][0]
    )
    mean = np.mean([one["there"][0] for one in summary["targets"]["digits"].values()])
    assert over_targets(summary, "digits", "there") == [pytest.approx(mean)]
    other = json.loads(json.dumps(summary))
    other["targets"]["digits"]["digits noise 0.4"]["there"] = None
    assert over_targets(other, "digits", "before")[0] == pytest.approx(
        np.mean([one["before"][0] for one in [*other["targets"]["digits"].values()][1:]])
    )
    assert statistics_table(other, "digits").rows[0][-2:] == ("", "")
    assert claims(other)
    for made_by, num in ((statistics_table, 3 + 2 + 2), (blended_table, 2 + 3), (stream_table, 2 + 4 + 2)):
        table = made_by(summary, "digits")
        assert [row[0] for row in table.rows] == [*summary["targets"]["digits"]]
        assert all(len(row) == len(table.columns) == num for row in table.rows)


def test_means_and_deviations():
    assert deviation([0.5]) == 0.0
    assert deviation([0.1, 0.2, 0.3]) == pytest.approx(0.1)
    assert shown([0.5, 0.7]) == "60.0 ± 14.1"
    assert [signed(x) for x in (0.123, -0.02, 0.0)] == ["+12.3", "−2.0", "+0.0"]


def test_verdicts_follow_the_numbers(made):
    _, _, summary = made

    def changed(**accuracies):
        other = json.loads(json.dumps(summary))
        for place, of in enumerate(other["targets"]["digits"].values()):
            of["before"], of["there"] = [0.5], [0.9]
            for name, run in of["runs"].items():
                values = accuracies.get(name.replace(" ", "_"), [0.6])
                run["accuracy"] = [values[place % len(values)]]
        return [claim.verdict for claim in claims(other)]

    assert changed() == ["holds", "misses", "misses"]
    assert changed(statistics_32=[0.6, 0.4, 0.6])[0] == "misses"
    assert changed(blended_16=[0.7])[1] == "holds"
    assert changed(blended_16=[0.7, 0.7, 0.5])[1] == "partly"
    assert changed(entropy_stream_48=[0.7])[2] == "holds"
    assert changed(entropy_stream_48=[0.7, 0.5, 0.5])[2] == "misses"
    found = claims(summary)[0].ours
    assert "of the gaps to training there, taken together, are closed" in found
    other = json.loads(json.dumps(summary))
    for place, of in enumerate(other["targets"]["digits"].values()):
        of["before"], of["there"] = [0.5], [(0.51, 0.7, 0.9)[place]]
        of["runs"]["statistics 32"]["accuracy"] = [0.6]
    assert "; 49% of the gaps" in claims(other)[0].ours  # 0.3 of 0.61: no gap weighs more for being small


def test_pairs_are_judged_within_their_deviation(made):
    _, _, summary = made
    other = json.loads(json.dumps(summary))
    run = {"statistics 32": {"accuracy": [0.8, 0.9], "undone": [False] * 2}}
    of = dict(other["targets"]["digits"].popitem()[1])
    of["runs"] = {**{name: {**r, "accuracy": [0.5, 0.5]} for name, r in of["runs"].items()}, **run}
    for before, verdict in (([0.6, 0.6], "holds"), ([0.82, 0.84], "partly"), ([0.95, 0.99], "misses")):
        other["targets"]["usps"] = {"mnist": {**of, "before": before, "there": [0.9, 0.9]}}
        claim = claims(other)[0]
        assert "usps → mnist" in claim.text
        assert claim.verdict == verdict


def test_chromium_shows_the_page_without_error_or_request(browser, made, tmp_path):
    _, _, summary = made
    page = write_report(summary, tmp_path, {"torch": "2"})
    assert [path.name for path in tmp_path.glob("*.png")] == ["digits.png"]
    browser.get(page.as_uri())
    assert (
        browser.execute_script("return document.querySelectorAll('.plot .scatterlayer .trace').length") >= 4
    )
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]


def test_the_command_runs_and_a_second_call_only_reports(tmp_path, capsys, monkeypatch):
    out = tmp_path / "adaptation"
    small_settings = "--seeds 1 --epochs 1 --examples 16 --stream 32 --stream-batches 16 --processes 1"
    arguments = ["reproduce", "adaptation", *small_settings.split(), "--out", str(out)]

    def here(work, parts, **_):
        for part in parts:
            work(*part)

    monkeypatch.setattr("batchnorm.reproduce.parts.run_jobs", here)
    monkeypatch.setitem(STRENGTHS, "grey", {"noise": (0.4,), "blur": (2.5,), "contrast": (0.3,)})
    assert main(arguments) == 0
    assert f"Report: {out / 'report.html'}" in capsys.readouterr().out
    first = json.loads((out / "result.json").read_text())
    assert main(arguments) == 0
    assert "4 of 4 parts are already done" in capsys.readouterr().err
    assert json.loads((out / "result.json").read_text()) == first
    assert main([*arguments, "--stream", "64"]) == 2
    assert "other settings (stream 32 there, 64 asked)" in capsys.readouterr().err
