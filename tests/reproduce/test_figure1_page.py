"""The page of figure 1, as a browser shows it."""

import numpy as np
import pytest
from browsing import requests_of

from batchnorm.reproduce.activations import Activations
from batchnorm.reproduce.activations.job import History
from batchnorm.reproduce.activations.page import claims, write_report
from batchnorm.reproduce.activations.summary import Histories, summarize

STEPS = np.array([0, 100, 500, 1000, 1500])


def history(best: float, wander: float, seed: int) -> History:
    """Accuracy rises to ``best``; medians of all units move by ``wander`` an evaluation."""
    rng = np.random.default_rng(seed)
    accuracy = best * (1 - np.exp(-STEPS / 300)) * np.ones((2, 1)) + rng.normal(0, 1e-3, (2, len(STEPS)))
    middle = wander * np.arange(len(STEPS))[:, None, None] * rng.uniform(0.5, 1.5, (3, 6))
    percentiles = middle[None, ..., None] + np.array([-1.0, 0.0, 1.0])
    return History(STEPS, accuracy, accuracy, np.repeat(percentiles, 2, 0), np.array([60.0, 20.0]))


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    experiment = Activations(seeds=2, rates=(0.1, 0.5), steps=1500, out=tmp_path_factory.mktemp("figure1"))
    plain, bn = ([history(best, wander, s) for s in (0, 1)] for best, wander in ((0.8, 1.0), (0.9, 0.1)))
    return summarize(experiment, Histories(plain, bn))


def test_claims_say_what_was_measured(summary):
    faster, higher, speed, stable = claims(summary)
    assert [claim.verdict for claim in (faster, higher, speed, stable)] == ["holds"] * 4
    assert "above at 3 of 3 evaluations" in faster.ours
    assert "6 of 6 seed by seed" in faster.ours
    assert higher.ours.startswith("+9.9")
    assert speed.ours == "rate 0.1: 1.5 times; rate 0.5: 1.5 times"
    plain, bn = (summary["distributions"][kind]["path_length"][2]["mean"] for kind in ("plain", "bn"))
    assert plain == pytest.approx(10 * bn)
    assert f"layer 3: {plain:.1f} against {bn:.1f} widths" in stable.ours


def test_claims_that_fail_are_published_as_misses(summary):
    worse = {**summary, "rates": []}
    for row in summary["rates"]:
        swapped = {"plain": row["final"]["bn"], "bn": row["final"]["plain"]}
        lost = {"mean": -0.1, "std": 0.01, "min": -0.11, "max": -0.09}
        never = {**row["speed_up"], "median_ratio": 0.0, "reached": 0}
        final = {**swapped, "difference": lost}
        worse["rates"].append({**row, "final": final, "mean_above": 0, "pairs_above": 0, "speed_up": never})
    ways = summary["distributions"]
    worse["distributions"] = {"plain": ways["bn"], "bn": ways["plain"]}
    assert [claim.verdict for claim in claims(worse)] == ["misses"] * 4
    assert claims(worse)[2].ours == "rate 0.1: never; rate 0.5: never"


def test_chromium_shows_every_plot_without_error_or_request(browser, summary, tmp_path):
    page = write_report(summary, tmp_path, {"torch": "2"})
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        "accuracy.png",
        "drift.png",
        "figure-1a.png",
        "inputs.png",
    ]
    browser.get(page.as_uri())
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => ({"
        " traces: p.querySelectorAll('.scatterlayer .trace').length,"
        " lines: [...p.querySelectorAll('path.js-line')].filter(l => l.getTotalLength() > 100).length }))"
    )
    # Two rates of two curves with band edges; two panels of three lines with band edges; six drifts.
    assert [plot["traces"] for plot in shown] == [6, 6, 10, 6]
    assert all(plot["lines"] >= plot["traces"] // 2 for plot in shown)
    assert "holds" in browser.find_element("tag name", "table").text
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]
