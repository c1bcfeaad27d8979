"""The command under torchrun: one report, one folder, clean ends."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from batchnorm.cli import main
from batchnorm.cli.torchrun import joined, quiet_but_first
from batchnorm.train.checkpoint import load_checkpoint
from batchnorm.train.metrics import read_metrics

LIMIT_S = 300
QUICK = ["--hidden", "12", "--eval-every", "20", "--log-every", "10", "--checkpoint-every", "10"]


def torchrun(*arguments, **options):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--monitor-interval", "0.1", *options.pop("agent", ()), "-m", "batchnorm", "train", *arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def pids_of_ranks(agent):
    """Process by rank of torchrun's children."""
    found = {}
    for path in os.scandir("/proc"):
        try:
            with open(f"{path.path}/stat") as stat, open(f"{path.path}/environ") as environ:
                parent = int(stat.read().rpartition(")")[2].split()[1])
                rank = re.search(r"(?:^|\0)RANK=(\d+)", environ.read())
            if parent == agent.pid and rank:
                found[int(rank[1])] = int(path.name)
        except (OSError, ValueError):
            continue
    return found


def until(agent, condition):
    limit = time.perf_counter() + LIMIT_S
    while not condition():
        assert agent.poll() is None, agent.communicate()
        assert time.perf_counter() < limit
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_rank_is_killed_the_folder_is_refused_and_a_signal_stops_all(tmp_path):
    """One training that meets it all, as starting torchrun takes seconds."""
    out = tmp_path / "run"
    recipe = ["bn-mlp", *QUICK, "--steps", "100000", "--out", str(out), "--no-tensorboard"]
    agent = torchrun(*recipe, agent=["--max-restarts", "1"])
    try:
        until(agent, (out / "checkpoints" / "step-20").exists)
        first = pids_of_ranks(agent)
        assert sorted(first) == [0, 1]
        second = main(["train", *recipe])
        assert second == 2
        os.kill(first[1], signal.SIGKILL)
        until(agent, lambda: len(read_rows(out)) and sorted(pids_of_ranks(agent)) == [0, 1])
        until(agent, lambda: not set(first.values()) & set(pids_of_ranks(agent).values()))
        before = newest(out)
        until(agent, lambda: newest(out) > before)
        agent.send_signal(signal.SIGTERM)
        _, said = agent.communicate(timeout=LIMIT_S)
    finally:
        agent.kill()
    assert agent.returncode != 0
    # Once, of two ranks.
    (stopped,) = re.findall(r"batchnorm: SIGTERM: stopped after step (\d+), which is saved in", said)
    assert load_checkpoint(out / "checkpoints" / f"step-{stopped}").step == int(stopped)
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
    assert steps == list(range(10, int(stopped) + 1, 10))
    evaluations = re.findall(r"^step (\d+)/100000 ", said, re.MULTILINE)
    assert len(evaluations) <= len(set(evaluations)) + 1  # one may be repeated after the kill
    assert json.loads((out / "environment.json").read_text())["ranks"] == 2


def read_rows(out):
    return (out / "metrics.jsonl").read_bytes().splitlines()


def newest(out):
    return max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_errors_and_results_are_told_once(tmp_path):
    out = tmp_path / "run"
    agent = torchrun("bn-mlp", *QUICK, "--steps", "20", "--out", str(out), "--no-tensorboard")
    said, told = agent.communicate(timeout=LIMIT_S)
    assert agent.returncode == 0, told
    assert said.count("top-1") == 1
    assert told.count("step 20/20") == 1
    agent = torchrun("bn-mlp", *QUICK, "--steps", "30", "--out", str(out), "--no-tensorboard")
    _, told = agent.communicate(timeout=LIMIT_S)
    assert agent.returncode != 0
    assert told.count("batchnorm: error:") == 1
    assert "steps (asked for 30, there 20)" in told
    assert 'line "' not in told.partition("batchnorm: error:")[0]


def test_python_m_batchnorm():
    done = subprocess.run([sys.executable, "-m", "batchnorm", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("batchnorm ")


@pytest.mark.parametrize("timeout", ["0", "-3", "inf"])
def test_a_timeout_that_is_none(tmp_path, capsys, timeout):
    assert main(["train", "mlp", "--out", str(tmp_path / "run"), "--timeout", timeout]) == 2
    assert "--timeout must be above 0 seconds and finite" in capsys.readouterr().err


def test_others_that_never_come(monkeypatch):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=r"rank 1 of 2 could not join the others at 127\.0\.0\.1:1 within 1 s"):
        with joined(1.0, "cpu"):
            pass
    assert not dist.is_initialized()


@pytest.fixture
def dead_link(monkeypatch):
    """Rank 1's way to the store: connections are taken and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.mark.parametrize("agent_store", ["True", "False"], ids=["torchrun's store", "rank 0's store"])
def test_a_link_that_is_dead_from_the_start(dead_link, monkeypatch, agent_store):
    """Over it PyTorch's own limit does not count."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent_store)
    with pytest.raises(OSError, match=r"rank 1 of 2 could not join the others at .* within 1 s: no answer"):
        with joined(1.0, "cpu"):
            pass
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_process_on_a_dead_link_ends(dead_link, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    command = [sys.executable, "-m", "batchnorm", "train", "mlp", "--out", tmp_path, "--timeout", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 2
    assert done.stderr.startswith("batchnorm: error: rank 1 of 2 could not join the others")


def test_only_rank_0_prints(monkeypatch, capsys):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with quiet_but_first():
            print("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"
