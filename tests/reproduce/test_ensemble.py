"""Figure 4: members, and errors of one and of all, by one crop and by many."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from batchnorm.data import ImageData
from batchnorm.reproduce.ensemble import Ensemble, run
from batchnorm.reproduce.ensemble.page import claims, write_report
from batchnorm.reproduce.ensemble.run import summarize
from batchnorm.train import get_recipe
from batchnorm.train.predictions import Predictions


@pytest.fixture
def experiment(tmp_path):
    return Ensemble(out=tmp_path)


@pytest.fixture
def predicted(monkeypatch):
    """Six networks, each of which is wrong about another image, and less sure with one crop."""
    labels = np.arange(12) % 3
    right = torch.nn.functional.one_hot(torch.from_numpy(labels), 3).double()
    wrong = torch.nn.functional.one_hot(torch.from_numpy((labels + 1) % 3), 3).double()

    def run_predictions(folder, *, data_dir, crops):
        number = int(folder.name[-1]) - 1
        said = right.clone()
        mistakes = [number] if crops == 10 else [number, number + 6]
        said[mistakes] = wrong[mistakes]
        return Predictions(((said + 0.2) / 1.6).log(), labels), None

    monkeypatch.setattr(run, "run_predictions", run_predictions)


def test_members_are_the_papers_at_this_scale(experiment):
    members = experiment.members()
    assert list(members) == [f"ensemble-{n}" for n in range(1, 7)]
    for name, recipe in members.items():
        differences = recipe.differences(get_recipe(name, "cifar10"))
        assert {part.split()[0] for part in differences} <= {"log_every", "eval_every", "checkpoint_every"}
    assert experiment.members()["ensemble-4"].per_activation


def test_errors_are_those_counted_by_hand(experiment, predicted):
    summary = summarize(experiment)
    json.dumps(summary, allow_nan=False)
    single, multi = summary["errors"]["single"], summary["errors"]["multi"]
    assert single["mean"]["top1"] == pytest.approx(2 / 12)
    assert multi["mean"]["top1"] == pytest.approx(1 / 12)
    # Five of six are right about every image.
    assert multi["ensemble"]["top1"] == 0
    assert multi["members"]["ensemble-3"]["top1"] == pytest.approx(1 / 12)
    # 11 members' images with the truth at 1.2 / 1.6 of the probability, or 0.2 / 1.6.
    each = np.log([1.2 / 1.6] * 11 + [0.2 / 1.6])
    assert multi["mean"]["loss"] == pytest.approx(-each.mean())
    together = np.log([(5 * 1.2 + 0.2) / 6 / 1.6] * 6 + [1.2 / 1.6] * 6)
    assert multi["ensemble"]["loss"] == pytest.approx(-together.mean())
    assert [claim.verdict for claim in claims(summary)] == ["holds", "holds"]


def test_verdicts(experiment, predicted):
    summary = summarize(experiment)
    summary["errors"]["multi"]["mean"]["top1"] = 0.5
    assert [claim.verdict for claim in claims(summary)] == ["misses", "holds"]
    # Better than the mean of the members, and not than the best of them.
    summary["errors"]["multi"]["ensemble"]["top1"] = 0.2
    assert claims(summary)[1].verdict == "partly"


def test_report_has_the_papers_figure(experiment, predicted, tmp_path):
    page = write_report(summarize(experiment), tmp_path, {}).read_text()
    for part in (
        "21.99 %",
        "4.9 %",
        "per-activation BN in the last module",
        "initial weights × 1.5, dropout 5%",
    ):
        assert part in page


def test_whole_experiment_small(monkeypatch, tmp_path):
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 24)
    images = random.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)
    data = ImageData("cifar10", images[:16], labels[:16], images[16:], labels[16:], ("a", "b", "c"))
    from batchnorm.reproduce import training
    from batchnorm.train import predictions

    for module in (training, predictions):
        monkeypatch.setattr(module, "load", lambda *_, **__: data)

    def in_this_process(work, jobs, **_):
        for job in jobs:
            work(*job)

    for module in (training, run):
        monkeypatch.setattr(module, "run_jobs", in_this_process)
    how = {"log_every": 2, "eval_every": 2, "checkpoint_every": 2, "eval_examples": 0}
    members = Ensemble(out=tmp_path).members()
    small = {
        name: replace(members[name], width=0.03, steps=2, batch_size=8, recalibrate_examples=8, **how)
        for name in ("ensemble-2", "ensemble-4")
    }
    monkeypatch.setattr(Ensemble, "members", lambda self: small)
    summary = run.run_experiment(Ensemble(out=tmp_path))
    assert (tmp_path / "report.html").exists()
    assert json.loads((tmp_path / "result.json").read_text()) == summary
    assert set(summary["errors"]["single"]["members"]) == {"ensemble-2", "ensemble-4"}
    # The second time nothing is trained or evaluated.
    monkeypatch.setattr(predictions, "_predict", None)
    assert run.run_experiment(Ensemble(out=tmp_path)) == summary


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"crops": 1}, "crops must be 10 or 144"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"time": 0.0}, "time must be above 0"),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(ValueError, match=says):
        Ensemble(**settings)
