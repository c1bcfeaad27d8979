"""Figures 2 and 3: which trainings, what is counted, and an experiment that goes on where it stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest

from batchnorm.data import ImageData
from batchnorm.reproduce import training
from batchnorm.reproduce.speedup import Speedup
from batchnorm.reproduce.speedup.page import claims, write_report
from batchnorm.reproduce.speedup.summary import best_rate, percent, spread, summarize
from batchnorm.reproduce.training import Course, courses, path_of, run_training, train_all
from batchnorm.train import get_recipe


def course(experiment, name, recipe, accuracy, every=100, diverged=None):
    return Course(
        name,
        recipe,
        np.arange(1, len(accuracy) + 1) * every,
        np.array(accuracy, dtype=float),
        10.0,
        diverged,
        None if diverged else {"top1": accuracy[-1], "top5": 1.0, "loss": 1.0},
        "a processor",
    )


@pytest.fixture
def experiment(tmp_path):
    return Speedup(seeds=2, rates=(2.0, 5.0), out=tmp_path / "out")


@pytest.fixture
def found(experiment):
    """Courses made up so that every figure can be counted by hand."""
    plain = [[0.2, 0.3, 0.4, 0.5, 0.5, 0.6, 0.6, 0.6], [0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.7]]
    accuracies = {
        "inception": plain,
        "bn-baseline": [[0.3, 0.5, 0.6, 0.7], [0.3, 0.5, 0.6, 0.7]],
        "bn-x5": [[0.6, 0.7, 0.75], [0.65, 0.7, 0.8]],
        "bn-x30": [[0.4, 0.6, 0.9], [0.4, 0.6, 0.8]],
        "bn-x5-sigmoid": [[0.2, 0.3, 0.4], [0.2, 0.3, 0.5]],
    }
    recipes = experiment.networks()
    result = {
        f"{name}-seed-{seed}": course(experiment, name, recipes[f"{name}-seed-{seed}"], of[seed])
        for name, of in accuracies.items()
        for seed in range(2)
    }
    result["inception-sigmoid-seed-0"] = course(
        experiment, "s", recipes["inception-sigmoid-seed-0"], [0.1, 0.1]
    )
    for seed in range(2):
        at_2 = experiment.at_rate(2.0, seed)
        result[f"inception-x2-seed-{seed}"] = course(experiment, "r", at_2, [0.5, 0.6, 0.65, 0.7])
    result["inception-x5-seed-0"] = course(
        experiment, "d", experiment.at_rate(5.0, 0), [0.1], diverged="The loss became nan at step 150"
    )
    for what in ("dropout", "shuffling"):
        name = experiment.ablation_name(what, 0)
        result[name] = course(experiment, name, experiment.ablated()[name], [0.5, 0.6, 0.7])
    return result


def test_trainings_are_the_papers(experiment):
    recipes = experiment.networks()
    assert len(recipes) == 2 * 5 + 1 + 2
    for name in ("inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"):
        for seed in range(2):
            recipe = recipes[f"{name}-seed-{seed}"]
            paper = get_recipe(name, "cifar10")
            how = {"seed", "log_every", "eval_every", "checkpoint_every"}
            how |= {"steps"} if name in ("bn-x5", "bn-x30", "bn-x5-sigmoid") else set()
            assert {part.split()[0] for part in recipe.differences(paper)} <= how
            assert recipe.seed == seed
    assert recipes["inception-x5-seed-0"].learning_rate == pytest.approx(5 * 0.0015)
    sigmoid = recipes["inception-sigmoid-seed-0"]
    assert (sigmoid.activation, sigmoid.normalize) == ("sigmoid", False)


def test_each_ablation_undoes_one_change(experiment):
    whole, plain = experiment.recipe("bn-x5", 0), experiment.recipe("inception", 0)
    fields = set()
    for recipe in experiment.ablated().values():
        (difference,) = recipe.differences(whole)
        field = difference.split()[0]
        assert getattr(recipe, field) == getattr(plain, field)
        fields.add(field)
    changed = {part.split()[0] for part in whole.differences(plain)}
    assert fields == changed - {"normalize", "steps", "log_every", "eval_every", "checkpoint_every"}


def test_best_rate_is_that_of_the_best_accuracy(experiment, found):
    assert best_rate(experiment, found) == 2.0
    # A tie goes to the paper's rate, and one that diverged is never best.
    found["inception-x2-seed-0"] = replace(found["inception-x2-seed-0"], accuracy=np.array([0.6] * 4))
    assert best_rate(experiment, found) == 1.0
    found["inception-x5-seed-0"] = replace(found["inception-x5-seed-0"], accuracy=np.array([0.99]))
    assert best_rate(experiment, found) == 1.0


def test_figures_are_those_counted_by_hand(experiment, found):
    summary = summarize(experiment, found)
    json.dumps(summary, allow_nan=False)
    networks = summary["networks"]
    # Plain has its best, 0.6 and 0.7, at steps 600 and 800.
    baseline = networks["bn-baseline"]["against"]
    assert [row["steps"] for row in baseline["seeds"]] == [300, 400]
    assert [row["ratio"] for row in baseline["seeds"]] == [2.0, 2.0]
    assert [row["ratio"] for row in networks["bn-x5"]["against"]["seeds"]] == [6.0, 4.0]
    assert networks["bn-x5"]["against"]["median_ratio"] == 5.0
    # At twice the rate plain has 0.7 at step 400 of both seeds.
    own = networks["bn-x5"]["against_own_rate"]
    assert summary["best_rate"] == 2.0
    assert [row["ratio"] for row in own["seeds"]] == [2.0, 2.0]
    # One that never gets there has no ratio, and no median where half of the seeds never do.
    sigmoid = networks["bn-x5-sigmoid"]["against"]
    assert [row["steps"] for row in sigmoid["seeds"]] == [None, None]
    assert sigmoid["median_ratio"] is None
    assert networks["bn-x30"]["best"] == spread(np.array([0.9, 0.8]))
    assert summary["ablations"]["dropout"]["difference"]["mean"] == pytest.approx(0.7 - 0.75)
    assert summary["rates"]["5"]["diverged"] == "The loss became nan at step 150"


def test_a_seed_that_never_gets_there_counts_as_slowest(experiment, found):
    never = replace(found["bn-x5-seed-0"], accuracy=np.array([0.1, 0.2, 0.3]))
    summary = summarize(experiment, found | {"bn-x5-seed-0": never})
    against = summary["networks"]["bn-x5"]["against"]
    assert [row["ratio"] for row in against["seeds"]] == [None, 4.0]
    assert against["median_ratio"] == 2.0


def test_verdicts(experiment, found):
    def verdict(start, **changed):
        made = claims(summarize(experiment, found | changed))
        return next(claim.verdict for claim in made if claim.text.startswith(start))

    assert verdict("BN-Baseline has") == "holds"
    assert verdict("BN-x5 has") == "partly"  # five times, not ten
    assert verdict("BN-x30 ends") == "holds"
    assert verdict("With sigmoids") == "holds"
    assert verdict("Plain Inception at five") == "holds"
    tall = {f"bn-x5-seed-{s}": replace(found["bn-x5-seed-0"], accuracy=np.array([0.95])) for s in range(2)}
    for name in tall:
        tall[name] = replace(tall[name], steps=np.array([50]))
    assert verdict("BN-x5 has", **tall) == "holds"
    assert verdict("BN-x30 ends", **tall) == "partly"
    learned = replace(found["inception-sigmoid-seed-0"], accuracy=np.array([0.1, 0.4]))
    assert verdict("With sigmoids", **{"inception-sigmoid-seed-0": learned}) == "partly"
    fine = replace(found["inception-x5-seed-0"], diverged=None, accuracy=np.array([0.5]))
    assert verdict("Plain Inception at five", **{"inception-x5-seed-0": fine}) == "misses"


def test_report_has_every_section(experiment, found, tmp_path):
    page = write_report(summarize(experiment, found), tmp_path, {"torch": "x"}).read_text()
    for part in ("The claims", "Figure 2", "own best rate", "Sigmoid", "One change undone", "14 times"):
        assert part in page
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "rates.png", "sigmoid.png"}


def test_percent():
    assert percent(spread(np.array([0.5]))) == "50.00 %"
    assert percent(spread(np.array([0.5, 0.6])), signed=True) == "+55.00 ± 7.07 points"


@pytest.fixture
def colours(monkeypatch):
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 80)
    images = random.integers(0, 256, (80, 3, 32, 32), dtype=np.uint8)
    data = ImageData("cifar10", images[:64], labels[:64], images[64:], labels[64:], tuple("abcdefghij"))
    monkeypatch.setattr(training, "load", lambda *_, **__: data)
    return data


def small(experiment, **changes):
    return replace(
        experiment.recipe("bn-x5", 0), width=0.05, steps=4, batch_size=8, log_every=2, eval_every=2,
        checkpoint_every=2, recalibrate_examples=16, eval_examples=8, **changes,
    )  # fmt: skip


def test_a_job_writes_its_course_and_divergence_is_a_result(experiment, colours, tmp_path):
    recipes = {"fine": small(experiment), "wild": small(experiment, learning_rate=1e30)}
    (tmp_path / "jobs").mkdir()
    for name, recipe in recipes.items():
        run_training(tmp_path, name, recipe, "cifar10", None)
    found = courses(tmp_path, ["fine", "wild", "absent"])
    assert set(found) == {"fine", "wild"}
    fine, wild = found["fine"], found["wild"]
    assert fine.recipe == recipes["fine"]
    assert fine.steps.tolist() == [2, 4]
    assert fine.diverged is None
    assert 0 <= fine.final["top1"] <= 1
    assert fine.best == fine.accuracy.max()
    assert wild.final is None
    assert "step" in wild.diverged
    assert np.isnan(replace(wild, accuracy=np.array([])).best)


def test_finished_jobs_are_not_done_again_and_others_recipes_are_refused(
    experiment, colours, tmp_path, capsys
):
    (tmp_path / "jobs").mkdir()
    run_training(tmp_path, "fine", small(experiment), "cifar10", None)
    before = path_of(tmp_path, "fine").read_bytes()
    train_all(tmp_path, {"fine": small(experiment)}, "cifar10", None, title="again")
    assert path_of(tmp_path, "fine").read_bytes() == before
    assert "1 of 1 trainings are already done" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"another recipe.*dropout"):
        train_all(tmp_path, {"fine": small(experiment, dropout=0.5)}, "cifar10", None, title="other")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"bn_steps": 0}, "bn_steps must be at least 1"),
        ({"ablation_seeds": 0}, "ablation_seeds must be at least 1"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"rates": (0.5,)}, "must be above 1"),
        ({"time": 0.0}, "time must be above 0"),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(ValueError, match=says):
        Speedup(**settings)
