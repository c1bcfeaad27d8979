"""A training run killed with SIGKILL at ten random instants, started again each time; prints JSON.

A program of its own, so that the runs are forks of a process which has no threads and has already
imported everything: an attempt then starts at once, and the instants fall into the training.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.utils.tensorboard  # Else every fork would spend its life importing it.

from batchnorm.data import load
from batchnorm.train import bn_mlp, train


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    data = load("digits", size=8)
    recipe = replace(
        bn_mlp(), hidden=(16, 16), steps=300, batch_size=30, learning_rate=0.2, momentum=0.9, seed=seed,
        log_every=5, eval_every=25, checkpoint_every=7, recalibrate_examples=120,
    )  # fmt: skip

    # The first training of a process costs extra: here, not in every fork.
    train(replace(recipe, steps=1), data, folder / "first", progress=False, tensorboard=False)

    def start(out: Path) -> int:
        child = os.fork()
        if child == 0:
            train(recipe, data, out, progress=False)
            os._exit(0)
        return child

    began = time.perf_counter()
    os.waitpid(start(folder / "whole"), 0)
    whole_s = time.perf_counter() - began

    chance = random.Random(seed)
    num_kills, reached = 0, []
    while num_kills < 10:
        child = start(folder / "killed")
        time.sleep(chance.uniform(0, 0.18) * whole_s)
        finished, _ = os.waitpid(child, os.WNOHANG)
        if finished:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        num_kills += 1
        steps = [int(path.name[5:]) for path in (folder / "killed" / "checkpoints").glob("step-*")]
        reached.append(max(steps, default=0))
    _, status = os.waitpid(start(folder / "killed"), 0)
    json.dump({"num_kills": num_kills, "reached": reached, "status": status, "whole_s": whole_s}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
