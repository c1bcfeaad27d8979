"""Faults of a distributed training on this machine: how many it survives.

Random ranks of torchrun's elastic agent are killed with SIGKILL at random instants, of start-up, training,
evaluation and writing. A kill is survived if the next attempt goes on from a whole checkpoint, nothing hangs
past its limit, and the run ends with the bits of one that nobody disturbed. Then come the faults of
tests/distributed_train/test_faults.py and, for root on Linux, the links of test_two_hosts.py that go down.
Writes one JSON file and a log beside it; about ten minutes on two idle cores.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What DDP imports when it is first made: here, not in every fork.
import torch._dynamo
import torch.distributed.rpc
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import batchnorm.cli.train  # noqa: F401  (likewise)
from batchnorm import files
from batchnorm.cli import main as cli
from batchnorm.files import write_json
from batchnorm.train.checkpoint import load_checkpoint
from batchnorm.train.metrics import read_metrics
from batchnorm.train.run import environment

ROOT = Path(__file__).parents[1]
RECIPE = [
    "bn-mlp",
    "--hidden",
    "30",
    "30",
    "--batch-size",
    "61",
    "--learning-rate",
    "0.3",
    "--momentum",
    "0.9",
]
EVERY = ["--eval-every", "60", "--log-every", "10", "--recalibrate-examples", "300", "--no-tensorboard"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a rank waits for another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-others", action="store_true", help="only the kills")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "faults.json")
    options = parser.parse_args()
    log = options.out.with_suffix(".log").open("w", buffering=1)

    def tell(text: str) -> None:
        print(text, file=sys.stderr)
        log.write(text + "\n")

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        killed = kills(Path(folder), options, tell)
    others = [] if options.no_others else other_faults(tell)
    faults = [*killed["kills"], *others]
    survived = sum(fault["survived"] for fault in faults)
    facts = environment(torch.device("cpu"), options.ranks)
    write_json(
        options.out,
        {
            "survived": survived,
            "total": len(faults),
            "environment": facts,
            "killed": killed,
            "others": others,
        },
    )
    tell(f"survived {survived} of {len(faults)}")
    sys.exit(survived < len(faults))


def kills(folder: Path, options: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    began = time.perf_counter()
    agent = Agent(start(folder / "whole", options, restarts=0))
    while agent.is_running() and not newest(folder / "whole"):
        time.sleep(0.02)
    first_s = time.perf_counter() - began
    agent.wait(3600)
    whole_s = time.perf_counter() - began
    tell(f"undisturbed: {whole_s:.1f} s, of which {first_s:.1f} s to the first checkpoint")
    chance = random.Random(options.seed)
    found: list[dict[str, Any]] = []
    runs = 0
    while len(found) < options.kills:
        out = folder / f"killed-{runs}"
        mine = disturb(out, options, chance, options.kills - len(found), first_s, whole_s, tell)
        same = is_same(folder / "whole", out)
        tell(f"run {runs}: {len(mine)} kills; ends with the bits of the undisturbed one: {same}")
        for kill in mine:
            kill["survived"] = same and kill.pop("went_on")
        found += mine
        runs += 1
    return {"whole_s": whole_s, "first_checkpoint_s": first_s, "runs": runs, "kills": found}


def start(out: Path, options: argparse.Namespace, restarts: int) -> int:
    """The process of an elastic agent, torchrun's own, whose ranks are forks of what is imported here.

    So an attempt starts at once, and instants fall into the training, which is what shall be disturbed.
    """
    pids = out.with_name(f"{out.name}-pids")
    pids.mkdir()
    agent = os.fork()
    if agent:
        return agent
    with open(f"{out}.log", "ab", buffering=0) as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.ranks,
        run_id=out.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.05,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(log_dir=f"{out}-logs"),
    )
    sizes = ["--steps", str(options.steps), "--checkpoint-every", str(options.checkpoint_every)]
    command = ["train", *RECIPE, *EVERY, *sizes, "--timeout", str(options.timeout)]
    try:
        elastic_launch(config, rank)([*command, "--no-progress", "--out", str(out)], pids)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def rank(command: list[str], pids: Path) -> None:
    # A fork has the agent's, which would wait for a collective to end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    files.write_bytes(pids / os.environ["RANK"], str(os.getpid()).encode())
    sys.exit(cli(command))


def disturb(
    out: Path,
    options: argparse.Namespace,
    chance: random.Random,
    most: int,
    first_s: float,
    whole_s: float,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One training, whose ranks are killed at most so often; every kill with what came of it."""
    done: list[dict[str, Any]] = []
    agent = Agent(start(out, options, restarts=most))
    before: set[int] = set()
    # A rank waits for another as long as it was told, and then there is the next attempt.
    limit_s = 2 * options.timeout + 3 * whole_s
    while len(done) < most:
        began = time.perf_counter()
        ranks = fresh_ranks(agent, out, before, options.ranks, limit_s)
        if not ranks:
            break
        if done:
            done[-1] |= {"went_on": True, "restart_s": round(time.perf_counter() - began, 2)}
        wait_for_an_instant(agent, out, options, chance, first_s, limit_s)
        victim = chance.randrange(options.ranks)
        if not agent.is_running():
            break
        try:
            os.kill(ranks[victim], signal.SIGKILL)
        except ProcessLookupError:
            # It has just ended by itself.
            agent.wait(limit_s)
            break
        before = set(ranks.values())
        done.append({"rank": victim, "checkpoint": newest(out), "went_on": False, "restart_s": None})
        tell(f"  kill {len(done)}: rank {victim}, newest checkpoint {done[-1]['checkpoint']}")
    agent.wait(limit_s)
    if agent.is_running():
        tell("  it hangs")
        for process in [*before, agent.pid]:
            os.kill(process, signal.SIGKILL)
    elif done:
        done[-1]["went_on"] = agent.status == 0
    return done


def wait_for_an_instant(
    agent: "Agent",
    out: Path,
    options: argparse.Namespace,
    chance: random.Random,
    first_s: float,
    limit_s: float,
) -> None:
    """Every third within the time that a start takes; else somewhere in the next few checkpoints' steps."""
    if chance.random() < 1 / 3:
        time.sleep(chance.uniform(0, first_s))
        return
    began, reached = time.perf_counter(), newest(out)
    steps = reached + options.checkpoint_every * chance.randint(1, 4)
    while agent.is_running() and newest(out) < steps and time.perf_counter() < began + limit_s:
        time.sleep(0.005)
    each_s = (time.perf_counter() - began) * options.checkpoint_every / max(newest(out) - reached, 1)
    time.sleep(chance.uniform(0, min(each_s, 2.0)))


class Agent:
    """A child process, which may have ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None

    def is_running(self) -> bool:
        if self.status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def wait(self, limit_s: float) -> None:
        limit = time.perf_counter() + limit_s
        while self.is_running() and time.perf_counter() < limit:
            time.sleep(0.05)


def fresh_ranks(agent: Agent, out: Path, before: set[int], num: int, limit_s: float) -> dict[int, int]:
    """Process by rank once all of a new attempt are there; none if the agent ended or nothing came."""
    pids = out.with_name(f"{out.name}-pids")
    limit = time.perf_counter() + limit_s
    while agent.is_running() and time.perf_counter() < limit:
        ranks = {int(path.name): int(path.read_text()) for path in pids.glob("[0-9]*")}
        if len(ranks) == num and not before & set(ranks.values()):
            return ranks
        time.sleep(0.02)
    return {}


def newest(out: Path) -> int:
    return max((int(path.name[5:]) for path in (out / "checkpoints").glob("step-*")), default=0)


def is_same(whole: Path, other: Path) -> bool:
    """Whether both runs are finished and left the same bits and rows, and no half-written file."""
    try:
        ends = [load_checkpoint(sorted_checkpoints(run)[-1]) for run in (whole, other)]
        rows = [read_metrics(run / "metrics.jsonl") for run in (whole, other)]
        model = [(run / "model.safetensors").read_bytes() for run in (whole, other)]
    except (OSError, ValueError, IndexError):
        return False
    for row in [*rows[0], *rows[1]]:
        del row["seconds"]
    tensors = [dict(end.model) | dict(end.training) for end in ends]
    same = tensors[0].keys() == tensors[1].keys()
    same = same and all(tensors[0][name].equal(tensors[1][name]) for name in tensors[0])
    return same and rows[0] == rows[1] and model[0] == model[1] and not list(other.rglob("*.partial"))


def sorted_checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))


def other_faults(tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """The faults that are tests, each survived or not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        folder_of_tests = ROOT / "tests" / "distributed_train"
        tests = [str(folder_of_tests / name) for name in ("test_faults.py", "test_two_hosts.py")]
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        tell(done.stdout)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [
            {
                "fault": case.get("name"),
                "survived": case.find("failure") is None and case.find("error") is None,
            }
            for case in cases
            if case.find("skipped") is None
        ]


if __name__ == "__main__":
    main()
