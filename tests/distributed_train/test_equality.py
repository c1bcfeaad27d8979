"""Several ranks compute what one process computes. The trainings run in one program, equality_cases.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every case found, by its name."""
    program = Path(__file__).with_name("equality_cases.py")
    folder = tmp_path_factory.mktemp("equality")
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of(found, case):
    assert "failed" not in found[case], found[case]["failed"]
    return found[case]


def assert_all_stopped_at(step, answers):
    for rank, answer in enumerate(answers):
        assert "TrainingStopped" in answer["error"]["kinds"]
        assert f"SIGTERM: stopped after step {step}," in answer["error"]["message"]
        # One of them says so.
        assert answer["error"]["told_elsewhere"] == (rank > 0)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_without_normalization_any_number_of_ranks_is_one_process(found, ranks):
    case = of(found, "without_normalization")
    keys = [key for key in case if key.startswith(f"{ranks} ranks")]
    assert keys
    for key in keys:
        # Sums in another order: a few units in the last place of float32.
        assert case[key]["weights"] < 2e-6, key
        assert case[key]["loss"] < 5e-6
        assert case[key]["accuracy"] == 0
        assert case[key]["steps"] == [5, 8, 10, 12, 15, 16, 20, 24]


@pytest.mark.parametrize("which", ["2 ranks, 1", "3 ranks, 1", "2 ranks, 3"])
def test_synchronized_any_number_of_ranks_is_one_process(found, which):
    case = of(found, "synchronized")
    if "skipped" in case:
        pytest.skip(case["skipped"])
    (key,) = [key for key in case if key.startswith(which)]
    assert case[key]["weights"] < 1e-5
    assert case[key]["running"] < 1e-5
    assert case[key]["loss"] < 1e-5
    assert case[key]["accuracy"] == 0


def test_all_ranks_end_with_the_same_model_and_scores(found):
    for answers in of(found, "without_normalization")["answers"]:
        values = [answer["value"] for answer in answers]
        assert all(value == values[0] for value in values)
        assert values[0][2] == 359  # test images, each once


def test_a_run_goes_on_with_another_number_of_ranks(found):
    case = of(found, "number_of_ranks_changes")
    for step, answers in zip((6, 14, 19), case["stopped"], strict=True):
        assert_all_stopped_at(step, answers)
    assert all("value" in answer for answer in case["end"])
    assert case["weights"] < 2e-6
    assert case["accuracy"] == 0


@pytest.mark.parametrize("which", ["one batch", "micro-batches"])
def test_stopped_by_a_signal_to_one_rank_and_resumed_with_the_same_bits(found, which):
    case = of(found, "resumed")[which]
    for step, answers in zip((5, 16), case["stops"], strict=True):
        assert_all_stopped_at(step, answers)
    assert case["same"]


def test_a_batch_of_each_rank_is_a_larger_batch(found):
    assert of(found, "batch_of_each_rank")["weights"] < 2e-6


def test_ddp_row_statistics_are_of_all_ranks(found):
    case = of(found, "statistics_are_of_all_ranks")
    first, second = ({n: torch.tensor(v) for n, v in own.items()} for own in case["own"])
    for name in [n for n in first if n.endswith("running_mean")]:
        variance = name.replace("mean", "var")
        # While training each has its own, which nobody broadcasts.
        assert (first[name] - second[name]).abs().max() > 1e-3
        mean = (first[name] + second[name]) / 2
        between = (first[name] - second[name]).square() / 4
        within = (first[variance] + second[variance]) / 2
        torch.testing.assert_close(torch.tensor(case["pooled"][name]), mean)
        torch.testing.assert_close(torch.tensor(case["pooled"][variance]), within + between)
    for name, one in case["one"].items():
        if name.endswith("num_batches_tracked"):
            continue  # In how many batches the data came is all that differs.
        # Recalibrated by two ranks, each with half of the data, and by one process with all of them.
        torch.testing.assert_close(torch.tensor(case["two"][name]), torch.tensor(one), rtol=1e-6, atol=1e-7)
