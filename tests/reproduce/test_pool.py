"""Jobs in processes of their own: all done, errors handed on, a killed process noticed."""

import os
import signal
from pathlib import Path

import pytest
import torch

from batchnorm.reproduce.pool import advance, run_jobs


def write_threads(path: Path) -> None:
    path.write_text(str(torch.get_num_threads()))
    advance(1)


def fail(path: Path) -> None:
    raise ValueError(f"no {path.name} today")


def die(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_job_runs_on_one_thread(tmp_path):
    paths = [tmp_path / str(i) for i in range(3)]
    run_jobs(write_threads, [(path,) for path in paths], num_steps=3, num_processes=2)
    assert [path.read_text() for path in paths] == ["1", "1", "1"]


@pytest.mark.parametrize(
    ("work", "error", "says"),
    [(fail, ValueError, "no x today"), (die, RuntimeError, "a process was killed.*fewer --processes")],
    ids=["raises", "is killed"],
)
def test_a_job_that_fails_ends_the_run_with_its_reason(tmp_path, work, error, says):
    with pytest.raises(error, match=says):
        run_jobs(work, [(tmp_path / "x",)], num_steps=1)


def test_no_jobs_start_no_process(tmp_path):
    run_jobs(write_threads, [], num_steps=0)
    assert list(tmp_path.iterdir()) == []
