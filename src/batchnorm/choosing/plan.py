"""How long trials are, so that the time given is enough for all of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

LEAST_STEPS = 20
"""A trial of fewer says nothing about a training."""
EVALUATIONS = 4
"""In a trial, the last of them at its end."""
PROBE_SHARE = 0.03
"""Of the time, to measure how long steps take."""
RESERVE = 0.1
"""Share of the time kept back, as steps do not all take as long as those that were measured."""


@dataclass(frozen=True)
class Costs:
    """What was measured of each candidate, in seconds, summed over candidates where they all do it.

    Attributes:
        step_s: Of a step, by candidate.
        evaluation_s: Of an evaluation of one candidate, the mean.
        batch_s: Of putting one batch together, which all candidates share.
    """

    step_s: Mapping[str, float]
    evaluation_s: float
    batch_s: float

    @property
    def round_s(self) -> float:
        """One step of every candidate, on one batch."""
        return sum(self.step_s.values()) + self.batch_s

    def times(self, factor: float) -> "Costs":
        """All of them longer by a factor."""
        steps = {name: factor * seconds for name, seconds in self.step_s.items()}
        return Costs(steps, factor * self.evaluation_s, factor * self.batch_s)


@dataclass(frozen=True)
class Plan:
    """Steps of a trial and of a search for the learning rate.

    Attributes:
        steps: Of a trial.
        repetitions: How many trials each candidate has.
        num_rates: Learning rates of which each candidate takes its best; 1 needs no search.
    """

    steps: int
    repetitions: int
    num_rates: int

    @property
    def search_steps(self) -> int:
        """Of each trial of the search: half as many."""
        return -(-self.steps // 2) if self.num_rates > 1 else 0

    @property
    def points(self) -> list[int]:
        """Steps after which a trial is evaluated."""
        return sorted({-(-self.steps * k // EVALUATIONS) for k in range(1, EVALUATIONS + 1)})

    @property
    def rounds(self) -> int:
        """Steps that every candidate takes, in all."""
        return self.search_steps * self.num_rates + self.steps * self.repetitions

    def search_s(self, costs: Costs) -> float:
        """Seconds that the search should take."""
        if self.num_rates == 1:
            return 0.0
        return self.num_rates * (self.search_steps * costs.round_s + len(costs.step_s) * costs.evaluation_s)

    def seconds(self, costs: Costs) -> float:
        """What all should take."""
        evaluations = len(self.points) * self.repetitions * len(costs.step_s)
        training = self.steps * self.repetitions * costs.round_s
        return self.search_s(costs) + training + evaluations * costs.evaluation_s


def longest(costs: Costs, left_s: float, repetitions: int, num_rates: int) -> Plan:
    """The longest trials for which the time that is left is enough; never shorter than `LEAST_STEPS`."""

    def fits(steps: int) -> bool:
        return least_s(costs, repetitions, num_rates, steps) <= left_s

    low, high = LEAST_STEPS, LEAST_STEPS + 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Plan(low, repetitions, num_rates)


def least_s(costs: Costs, repetitions: int, num_rates: int, steps: int = LEAST_STEPS) -> float:
    """Seconds for trials of so many steps, with the reserve."""
    return Plan(steps, repetitions, num_rates).seconds(costs) / (1 - RESERVE)


def check_budget(budget_s: float, spent_s: float, costs: Costs, repetitions: int, num_rates: int) -> None:
    """Refuse a budget that is too small for `LEAST_STEPS`.

    Raises:
        ValueError: It is; says how much would do.
    """
    least = math.ceil(spent_s + least_s(costs, repetitions, num_rates))
    if least > budget_s:
        search = f" and a search of {num_rates} learning rates" if num_rates > 1 else ""
        raise ValueError(
            f"a budget of {budget_s:g} s is too little: {len(costs.step_s)} candidates with {repetitions} "
            f"repetitions of {LEAST_STEPS} steps{search} need {least} s. Give as much, or fewer "
            "candidates, repetitions or rates"
        )
