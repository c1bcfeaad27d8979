"""torchrun on two hosts: what one host computes, also when the link between them goes down."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from distributed_train import hosts
from distributed_train.hosts import LINK, two_hosts

from batchnorm.train.checkpoint import load_checkpoint
from batchnorm.train.metrics import read_metrics

WHY_NOT = hosts.why_not() if dist.is_gloo_available() else "torch without gloo"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

STEPS = 1500
LIMIT_S = 300
"""For a busy machine; an idle one needs seconds."""
TIMEOUT_S = 10
OUTAGE_S = 5

PORT = "29400"
RECIPE = ["bn-mlp", "--hidden", "12", "--batch-size", "61", "--steps", str(STEPS)]
EVERY = ["--checkpoint-every", "100", "--eval-every", "500", "--log-every", "100", "--no-tensorboard"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}


def torchrun(out, *arguments, timeout_s):
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1", *arguments),
        *("-m", "batchnorm", "train", *RECIPE, *EVERY, "--timeout", str(timeout_s), "--out", str(out)),
    ]


def train_on_one(out):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "GLOO_SOCKET_IFNAME"}
    command = torchrun(out, "--standalone", "--nproc-per-node", "2", timeout_s=LIMIT_S)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return done.stderr


class Training:
    """A process of torchrun on each of two hosts."""

    def __init__(self, pair, folder, timeout_s=LIMIT_S):
        self.out, self.errors = folder / "run", [folder / f"errors-{host.name}" for host in pair]
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{pair[0].address}:{PORT}"]
        command = torchrun(self.out, "--nnodes", "2", "--nproc-per-node", "1", *meet, timeout_s=timeout_s)
        self.agents = []
        for host, errors in zip(pair, self.errors, strict=True):
            with errors.open("w") as file:
                agent = host.start(*command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=file)
            self.agents.append(agent)

    def newest(self):
        return max((int(path.name[5:]) for path in (self.out / "checkpoints").glob("step-*")), default=0)

    def until_step(self, step):
        limit = time.perf_counter() + LIMIT_S
        while self.newest() < step:
            assert all(agent.poll() is None for agent in self.agents), self.said()
            assert time.perf_counter() < limit, self.said()
            time.sleep(0.02)

    def end(self, limit_s=LIMIT_S):
        """Exit statuses of both."""
        limit = time.perf_counter() + limit_s
        return [agent.wait(max(0.1, limit - time.perf_counter())) for agent in self.agents]

    def said(self):
        return [errors.read_text() for errors in self.errors]


@pytest.fixture
def pair(tmp_path):
    with two_hosts(tmp_path) as both:
        yield both


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """The run of two processes on one host."""
    out = tmp_path_factory.mktemp("one") / "run"
    train_on_one(out)
    return out


def assert_same_run(out, expected):
    """The same bits and rows, and nothing half-written."""
    ends = [load_checkpoint(run / "checkpoints" / f"step-{STEPS}") for run in (out, expected)]
    for part in ("model", "training"):
        got, want = (getattr(end, part) for end in ends)
        assert got.keys() == want.keys()
        assert [name for name in want if not got[name].equal(want[name])] == []
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    rows = [read_metrics(run / "metrics.jsonl") for run in (out, expected)]
    for row in [*rows[0], *rows[1]]:
        del row["seconds"]
    assert rows[0] == rows[1]
    assert not list(out.rglob("*.partial"))


def test_two_hosts_are_one_also_when_the_link_is_down_for_a_while(pair, one_host, tmp_path):
    training = Training(pair, tmp_path)
    training.until_step(200)
    pair[1].ip("link", "set", LINK, "down")
    time.sleep(0.5)
    before = training.newest()
    time.sleep(OUTAGE_S - 0.5)
    assert training.newest() == before < STEPS
    pair[1].ip("link", "set", LINK, "up")
    assert training.end() == [0, 0], training.said()
    assert_same_run(training.out, one_host)
    # The same attempt: nobody was started again.
    assert "lost contact" not in "".join(training.said())
    assert [host.processes() for host in pair] == [[], []]


def test_a_link_that_is_down_for_good_ends_both_and_one_goes_on(pair, one_host, tmp_path):
    for host in pair:
        # A dead connection is given up after 13 s, not a quarter of an hour: torchrun itself waits for that.
        host.set("net.ipv4.tcp_retries2", 5)
    training = Training(pair, tmp_path, TIMEOUT_S)
    training.until_step(200)
    pair[1].ip("link", "set", LINK, "down")
    began = time.perf_counter()
    statuses = training.end()
    assert time.perf_counter() - began < TIMEOUT_S + 60
    assert all(statuses)
    for rank, said in enumerate(training.said()):
        (told,) = re.findall(r"^batchnorm: error: .*", said, re.MULTILINE)
        assert f"rank {rank} of 2 lost contact with another rank" in told
        assert "Give the same command again" in told
    assert [host.processes() for host in pair] == [[], []]
    kept = training.newest()
    assert 200 <= kept < STEPS
    assert load_checkpoint(training.out / "checkpoints" / f"step-{kept}").step == kept
    train_on_one(training.out)
    assert_same_run(training.out, one_host)
