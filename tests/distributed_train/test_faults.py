"""What goes wrong on one rank ends all of them, soon and with one message; nothing that was saved is lost.

The faulty trainings run in one program, fault_cases.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every case found, by its name."""
    program = Path(__file__).with_name("fault_cases.py")
    folder = tmp_path_factory.mktemp("faults")
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def of(found, case):
    assert "failed" not in found[case], found[case]["failed"]
    return found[case]


def assert_all_said(answers, kind, *parts):
    """Every rank raised the same, and exactly one is to tell it."""
    assert {answer["error"]["message"] for answer in answers} == {answers[0]["error"]["message"]}
    for answer in answers:
        assert kind in answer["error"]["kinds"]
        for part in parts:
            assert part in answer["error"]["message"]
    assert [answer["error"]["told_elsewhere"] for answer in answers].count(False) == 1


def assert_lost(answers, *, died):
    for rank, answer in enumerate(answers):
        if rank == died:
            assert answer.get("died")
        else:
            assert "RankLost" in answer["error"]["kinds"]
            assert f"rank {rank} of 2 lost contact" in answer["error"]["message"]
        # Long before the limit of a minute: a closed connection is noticed at once.
        assert answer["seconds"] < answers[died]["seconds"] + 30


def assert_trained(answers):
    assert all("value" in answer for answer in answers), answers
    assert answers[0]["value"] == answers[1]["value"]


def test_a_rank_killed_in_the_middle(found):
    case = of(found, "lost")
    for fault, died in zip(case["lost"], (1, 0), strict=True):
        assert_lost(fault["answers"], died=died)
    assert case["lost"][0]["checkpoints"] == ["step-8"]
    assert case["lost"][1]["checkpoints"] == ["step-16", "step-8"]
    assert_trained(case["end"])
    assert case["same"]


def test_rank_0_killed_while_writing_a_checkpoint(found):
    case = of(found, "lost_while_writing")
    assert_lost(case["answers"], died=0)
    # Half of one is there, under a name that nobody reads.
    assert case["left"] == [".step-16.partial", "step-8"]
    assert_trained(case["end"])
    assert case["same"]


def test_a_rank_that_hangs_is_given_up_after_the_timeout(found):
    first, second = of(found, "hangs")["answers"]
    assert "RankLost" in first["error"]["kinds"]
    assert "error" in second
    # It sleeps for 16 s; the timeout is 4.
    assert first["seconds"] < second["seconds"] - 3


def test_batches_of_one_rank_end_early(found):
    case = of(found, "loader_ends")
    assert_all_said(case["answers"], "RuntimeError", "the batches of rank 1 of 2 ended after 11 of 24 steps")
    assert "step-11" in case["left"]
    assert_trained(case["end"])
    assert case["same"]


def test_the_loader_of_one_rank_fails(found):
    answers = of(found, "loader_fails")["answers"]
    assert_all_said(answers, "OSError", "No such file", "photos/17.jpg")
    assert answers[0]["error"]["told_elsewhere"]


def test_nan_on_one_rank(found):
    case = of(found, "nan")
    assert_all_said(case["answers"], "FloatingPointError", "became nan at step 11", "up to step 8")
    assert case["left"] == ["step-8"]
    assert case["finite"] == [True]


@pytest.mark.parametrize("which", ["plain", "normalized", "micro-batches"])
def test_unequal_numbers_of_examples_and_none(found, which):
    assert_trained(of(found, "uneven")["answers"][which])


def test_unequal_numbers_of_examples_weigh_as_they_are(found):
    case = of(found, "uneven")
    assert case["weights"] < 2e-6
    assert case["loss"] < 5e-6


@pytest.mark.parametrize("which", [0, 1], ids=["the newest", "all"])
def test_checkpoints_that_vanish(found, which):
    case = of(found, "folder_vanishes")["found"][which]
    assert_trained(case["end"])
    assert case["same"]


def test_two_launches_into_one_folder(found):
    case = of(found, "two_launches")
    assert_all_said(case["second"], "BlockingIOError", "is training in", "another folder")
    assert_all_said(case["other"], "ValueError", "seed (asked for 3, there 0)")
    assert case["rows"] == 0


def test_full_disk(found):
    case = of(found, "full_disk")
    assert_all_said(case["answers"], "OSError", "No space left", "step-16", "free some space")
    assert case["left"] == ["step-8"]


def test_ranks_with_other_recipes(found):
    answers = of(found, "ranks_told_otherwise")["answers"]
    assert_all_said(answers, "ValueError", "rank 1 differs from rank 0 in learning_rate")


def test_an_error_that_one_rank_meets_alone(found):
    first, second = of(found, "fails_in_the_step")["answers"]
    assert "RankLost" in first["error"]["kinds"]
    assert second["error"]["message"] == "rank 1 only"
    assert not second["error"]["told_elsewhere"]
