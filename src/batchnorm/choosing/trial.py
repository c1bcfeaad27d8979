"""One candidate in one repetition: its training, its time, and its scores on the way."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.choosing.scoring import Judge, Loss, training_loss
from batchnorm.doctor.data import run_batch
from batchnorm.statistics.feeding import Forward
from batchnorm.statistics.passes import same_random_numbers

MakeOptimizer = Callable[[list[nn.Parameter], float], torch.optim.Optimizer]


def clock() -> float:
    """Seconds; one function, so that all times are taken alike."""
    return time.perf_counter()


def sgd(parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


class Trial:
    """A model that takes steps when it is told to, with a random stream of its own.

    Args:
        model: Trained in place.
        make_optimizer: ``make_optimizer(parameters, rate)``.
        rate: Learning rate.
        seed: Of the random stream, from which dropout draws.
        loss: As in `training_loss`.
        forward: How to call the model; None for the usual way.

    Attributes:
        rate: As given.
        seconds: Spent in steps.
        steps: Taken.
        diverged: The step whose loss was not finite, after which there are no more; else None.
        scores: Steps taken, seconds spent in them, and score, at every evaluation.
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        rate: float,
        seed: int,
        loss: Loss | None,
        forward: Forward | None,
    ) -> None:
        self.model, self.rate, self.loss, self.forward = model, rate, loss, forward
        self.device = next((t.device for t in model.parameters()), torch.device("cpu"))
        self.optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], rate)
        with same_random_numbers(model):
            torch.manual_seed(seed)
            self._random = _random_states(self.device)
        self.seconds, self.steps = 0.0, 0
        self.diverged: int | None = None
        self.scores: list[tuple[int, float, float]] = []
        self._each: list[float] = []

    @property
    def step_s(self) -> float:
        """Seconds a step: the median over calls of `advance`."""
        return median(self._each) if self._each else math.nan

    def advance(self, batches: Sequence[Any]) -> None:
        """Take a step for each batch, unless it has diverged."""
        if self.diverged is not None or not batches:
            return
        with self._stream():
            self.model.train()
            start, before = self._now(), self.steps
            for batch in batches:
                loss = training_loss(run_batch(self.model, batch, self.steps, self.forward), batch, self.loss)
                if not math.isfinite(float(loss.detach())):
                    self.diverged = self.steps
                    break
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.steps += 1
            spent = self._now() - start
        self.seconds += spent
        if self.steps > before:
            self._each.append(spent / (self.steps - before))

    def evaluate(self, judge: Judge, numbers: Tensor) -> None:
        """Add a score; not finite if the trial has diverged."""
        if self.diverged is not None:
            return
        with self._stream(), torch.no_grad():
            self.model.eval()
            score = judge(self.model, numbers, self.device)
        self.scores.append((self.steps, self.seconds, score))
        if not math.isfinite(score):
            self.diverged = self.steps

    def forget_model(self) -> None:
        """Give the memory of model and optimizer back; what was measured stays."""
        del self.model, self.optimizer

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock()

    @contextmanager
    def _stream(self) -> Iterator[None]:
        """This trial's random numbers inside; those of others go on outside as if nothing had been drawn."""
        with same_random_numbers(self.model):
            _set_random_states(self._random, self.device)
            yield
            self._random = _random_states(self.device)


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.random.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.random.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)
