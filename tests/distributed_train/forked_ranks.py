"""Ranks as forks of a process that has imported everything already: they start at once."""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch

# What DDP imports when it is first made: here, not in every fork.
import torch._dynamo
import torch.distributed as dist
import torch.distributed.rpc


def on_ranks(num, action, *, limit_s=120.0, timeout_s=60.0):
    """What ``action(rank)`` returned on every rank, or how it ended.

    Each answer is a dict: ``value``; or ``error`` with ``kind``, ``message`` and whether another rank tells
    it; or ``signal``. All have ``seconds``.
    """
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        children = [_start(rank, num, action, Path(place), timeout_s) for rank in range(num)]
        ends = {}
        while len(ends) < num:
            for rank, child in enumerate(children):
                if rank not in ends and os.waitpid(child, os.WNOHANG)[0]:
                    ends[rank] = time.perf_counter() - began
                elif rank not in ends and time.perf_counter() - began > limit_s:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    ends[rank] = float("inf")
            time.sleep(0.01)
        answers = []
        for rank in range(num):
            path = Path(place, f"answer-{rank}")
            answer = json.loads(path.read_text()) if path.exists() else {"died": True}
            answers.append({**answer, "seconds": ends[rank]})
        return answers


def _start(rank, num, action, place, timeout_s):
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        # Told apart in what a test prints when it fails.
        warnings.simplefilter("error")
        store = dist.FileStore(str(place / "store"), num)
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num, timeout=limit)
        answer = {"value": action(rank)}
        dist.barrier()
    except BaseException as error:
        told = getattr(error, "told_elsewhere", False)
        kinds = [kind.__name__ for kind in type(error).__mro__]
        answer = {"error": {"kinds": kinds, "message": str(error), "told_elsewhere": told}}
        if "KeyboardInterrupt" not in kinds:
            traceback.print_exc()
    (place / f"partial-{rank}").write_text(json.dumps(answer))
    (place / f"partial-{rank}").rename(place / f"answer-{rank}")
    # No clean-up: the other ranks shall find out by themselves.
    os._exit(0)


def main(cases):
    """Run the cases named on the command line in a folder given first; print what they found as JSON."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {}
    for name in sys.argv[2:] or cases:
        place = folder / name
        place.mkdir(parents=True)
        began = time.perf_counter()
        try:
            found[name] = cases[name](place)
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    json.dump(found, sys.stdout)
