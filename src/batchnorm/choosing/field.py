"""Trials that take turns: the same batches for all, in the same order, and the same share of time."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.choosing import trial as trials
from batchnorm.choosing.candidates import Settings, build
from batchnorm.choosing.examples import Batches, Examples
from batchnorm.choosing.scoring import Judge, Loss, moved
from batchnorm.choosing.trial import MakeOptimizer, Trial
from batchnorm.statistics.feeding import Forward

TURN = 16
"""Steps that one candidate takes before the next has its turn, at most."""


class TimeIsUp(Exception):
    """The time given has passed; what is not finished is thrown away."""


@dataclass
class Field:
    """What all trials have in common.

    Attributes:
        examples: To learn from.
        judge: Gives scores.
        settings: What candidates are built with.
        make_optimizer: As of `Trial`.
        loss: Likewise.
        forward: Likewise.
        deadline: On `trial.clock`; None for no limit.
        tell: Called with a number of steps that every candidate has taken.
    """

    examples: Examples
    judge: Judge
    settings: Settings
    make_optimizer: MakeOptimizer
    loss: Loss | None
    forward: Forward | None
    deadline: float | None
    tell: Callable[[int], None]

    def trial(self, name: str, model: nn.Module, rate: float, seed: int) -> Trial:
        """A candidate before its first step; ``model`` is copied."""
        built = build(name, model, self.settings)
        return Trial(built.model, self.make_optimizer, rate, seed, self.loss, self.forward)

    def run(
        self,
        model: nn.Module,
        rates: Mapping[str, float],
        batches: Batches,
        held_out: Tensor,
        points: Sequence[int],
        seed: int,
    ) -> dict[str, Trial]:
        """Every candidate from the same weights on the same batches.

        Args:
            model: Whose copies they are.
            rates: Learning rate by candidate.
            batches: Which examples each step sees.
            held_out: Numbers of the examples that give the score.
            points: Steps after which they give it; the last ends the trials.
            seed: Of each trial's random stream, and of what data are loaded with.

        Raises:
            TimeIsUp: Before the end.
        """
        seed_all(seed)
        running = {name: self.trial(name, model, rate, seed) for name, rate in rates.items()}
        device = next(iter(running.values())).device
        done, turn = 0, 0
        for point in points:
            while done < point:
                steps = range(done, min(point, done + TURN))
                # Loaded once, so that random changes of the data are the same for all.
                loaded = [moved(self.examples.take(batches.at(step)), device) for step in steps]
                for name in _rotated(list(running), turn):
                    running[name].advance(loaded)
                done, turn = steps.stop, turn + 1
                self.tell(len(steps))
                self._check_time()
            for one in running.values():
                one.evaluate(self.judge, held_out)
            self._check_time()
        return running

    def _check_time(self) -> None:
        if self.deadline is not None and trials.clock() > self.deadline:
            raise TimeIsUp


def _rotated(names: list[str], turn: int) -> list[str]:
    # Who comes first finds other caches than who comes last.
    first = turn % len(names)
    return names[first:] + names[:first]


def seed_all(seed: int) -> None:
    """Seed the generators of torch, numpy and Python, with which data may be changed at random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def same_random_state() -> Iterator[Any]:
    """Leave the generators of torch (of all devices), numpy and Python as they are on entering."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)
