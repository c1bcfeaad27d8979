"""The trials themselves: a search for each candidate's learning rate, then repetition by repetition."""

import math
from collections.abc import Mapping, Sequence

from batchnorm.choosing import trial as trials
from batchnorm.choosing.field import Field, TimeIsUp
from batchnorm.choosing.plan import Plan
from batchnorm.choosing.split import Given, Split
from batchnorm.choosing.trial import Trial


def search(
    field: Field,
    given: Given,
    split: Split,
    names: Sequence[str],
    rates: Sequence[float],
    plan: Plan,
    notes: list[str],
) -> dict[str, float]:
    """Every candidate's best learning rate after short trials, the same for all."""
    if len(rates) == 1:
        return dict.fromkeys(names, rates[0])
    model = given.at(plan.repetitions)
    seed = given.seed + plan.repetitions
    batches, held_out = split.at(seed)
    best: dict[str, tuple[float, float]] = {}
    for rate in sorted(rates):
        found = field.run(model, dict.fromkeys(names, rate), batches, held_out, [plan.search_steps], seed)
        for name, trial in found.items():
            score = trial.scores[-1][2] if trial.diverged is None else math.nan
            if name not in best or field.judge.better(score, best[name][0]):
                best[name] = score, rate
    for edge, beyond in ((max(rates), "highest"), (min(rates), "lowest")):
        if at_edge := [name for name in names if best[name][1] == edge]:
            notes.append(
                f"{edge:g}, the {beyond} learning rate, was best for {', '.join(at_edge)}: there may be "
                "better ones beyond"
            )
    return {name: rate for name, (_, rate) in best.items()}


def repeat(
    field: Field,
    given: Given,
    split: Split,
    rates: Mapping[str, float],
    plan: Plan,
    seed: int,
    notes: list[str],
) -> list[dict[str, Trial]]:
    """The repetitions that the time allows; of one that was begun and not finished nothing is kept."""
    finished: list[dict[str, Trial]] = []
    longest_s = 0.0
    for repetition in range(plan.repetitions):
        began = trials.clock()
        if field.deadline is not None and began + longest_s > field.deadline:
            break
        batches, held_out = split.at(seed + repetition)
        try:
            found = field.run(given.at(repetition), rates, batches, held_out, plan.points, seed + repetition)
        except TimeIsUp:
            break
        for trial in found.values():
            trial.forget_model()
        finished.append(found)
        longest_s = max(longest_s, trials.clock() - began)
    if len(finished) < plan.repetitions:
        notes.append(
            f"{len(finished)} of {plan.repetitions} repetitions were finished in time: steps took longer "
            "than measured at first"
        )
    return finished
