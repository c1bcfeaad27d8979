"""Short trials of several kinds of normalization in one model, and what they say."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

from torch import nn

from batchnorm.choosing import trial as trials
from batchnorm.choosing.candidates import GROUPS, USUAL, Settings, check_names, norms_of
from batchnorm.choosing.choice import Choice, Tried
from batchnorm.choosing.examples import ORDERS, Order
from batchnorm.choosing.field import Field, TimeIsUp, same_random_state
from batchnorm.choosing.first_steps import first_steps, judge_of
from batchnorm.choosing.plan import PROBE_SHARE, Plan, check_budget, longest
from batchnorm.choosing.rounds import repeat, search
from batchnorm.choosing.scoring import Loss, Metric
from batchnorm.choosing.split import Given, Split
from batchnorm.choosing.trial import MakeOptimizer, Trial, sgd
from batchnorm.choosing.verdict import judge as judged
from batchnorm.distributed import alone
from batchnorm.statistics.feeding import Forward
from batchnorm.surgery.models import check_model


@alone()  # what is tried out here is no other rank's business
def choose(
    model: nn.Module | Callable[[], nn.Module],
    data: Any,
    held_out: Any = None,
    *,
    batch_size: int,
    budget_s: float | None = None,
    steps: int | None = None,
    repetitions: int = 5,
    candidates: Sequence[str] | None = None,
    rates: Sequence[float] = (0.003, 0.01, 0.03, 0.1),
    optimizer: MakeOptimizer = sgd,
    loss: Loss | None = None,
    metric: Metric | None = None,
    higher_is_better: bool = True,
    forward: Forward | None = None,
    order: Order = "examples",
    examples: int | None = None,
    ghost_size: int | None = None,
    groups: int = GROUPS,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> Choice:
    """Try several kinds of normalization in a model, at a batch size, and say which is best or that none is.

    In each repetition every candidate starts from the same weights, sees the same batches in the same
    order, takes turns with the others, and is scored on the same held-out examples; repetitions differ in
    the order of the data, the random stream (dropout), the examples held out, and, where ``model`` makes
    models, the initial weights. A candidate is recommended if a confidence interval of paired differences
    sets it apart from "plain". The model itself, its mode and all random state stay as they are.

    docs/methods/choose.md says what the trials can tell, and what not.

    Args:
        model: A model with batch normalization, from whose weights trials start; or a function that makes
            one, called anew for every repetition.
        data: To learn from: a tuple ``(inputs, labels)`` or a mapping of tensors that hold all examples; a
            map-style ``Dataset``; a ``DataLoader`` over one, whose dataset and ``collate_fn`` are used; or an
            iterable of batches, which are kept in memory and cut anew.
        held_out: Likewise, to give scores. By default a fifth of ``data``, 2,000 examples at most, drawn anew
            in every repetition; then no training example is among them.
        batch_size: Examples in a step.
        budget_s: Seconds for everything; the trials are as long as it allows. This or ``steps``.
        steps: Of each trial, whatever time they take; results are then the same in every run.
        repetitions: Trials of each candidate; two at least show a spread.
        candidates: Of "plain", "ghost", "renorm", "group", "frozen" and "synced", which are tried when None,
            and "accumulated", "evalnorm" and "whitened". Those that make no sense for this model or batch
            size are listed with the reason.
        rates: Learning rates. Of several, each candidate takes the one with the best score after half a
            trial of its own.
        optimizer: ``optimizer(parameters, rate)``; SGD with momentum 0.9 by default.
        loss: ``loss(output, batch)``, a tensor of one number. By default the output's own ``loss``, or
            cross-entropy where class scores (N, K) meet integer labels (N,) as the batch's second item.
        metric: ``metric(model)``, a number by which to judge instead of ``held_out``; the model is in
            evaluation mode. By default accuracy where there are classes, else the mean loss.
        higher_is_better: Of ``metric``.
        forward: ``forward(model, batch)`` runs the model on a batch, instead of the above.
        order: Which batches there are: "examples" are mixed anew in every epoch; "batches" of examples that
            follow one another in the data come in random order; or all "given" as they are.
        examples: Use only so many of ``data``: the first of an iterable or where order matters, else drawn.
        ghost_size: Of "ghost"; 32, or half the batch where that is less.
        groups: Of "group", at most: the largest divisor of the channels that leaves two in a group, or 16 in
            `BatchNorm1d`.
        confidence: Of the verdict as a whole.
        seed: Of everything that is drawn.
        progress: Draw a progress bar (needs rich, in ``batchnorm[train]``).

    Returns:
        The table, the verdict, and `Choice.apply`; ``print`` it.

    Raises:
        TypeError: A model, data, loss or metric of the wrong kind.
        ValueError: An argument out of range; no batch normalization; too few examples; no loss to be found;
            a budget that is too small, with the least that would do; no candidate that can run.
        RuntimeError: The model fails on the data with every candidate.
    """
    start = trials.clock()
    _check_numbers(batch_size, budget_s, steps, repetitions, rates, order, examples, groups, confidence)
    names = list(USUAL if candidates is None else candidates)
    check_names(names)
    settings = Settings(batch_size, ghost_size, groups)
    notes: list[str] = []
    with same_random_state():
        given = Given(model, seed)
        first = given.at(0)
        check_model(first, "choosing")
        if not norms_of(first):
            raise ValueError(
                f"{type(first).__name__} has no batch normalization to choose a kind of: bn.insert puts it in"
            )
        split = Split.of(data, held_out, metric, order, examples, batch_size, seed, notes)
        judge = judge_of(first, split, loss, forward, metric, higher_is_better)
        field = Field(split.examples, judge, settings, optimizer, loss, forward, None, lambda steps: None)
        about, not_tried, costs = first_steps(
            field, first, split, names, min(rates), seed, 0.0 if budget_s is None else PROBE_SHARE * budget_s
        )
        if budget_s is None:
            assert steps is not None
            plan = Plan(steps, repetitions, len(rates))
        else:
            check_budget(budget_s, trials.clock() - start, costs, repetitions, len(rates))
            field.deadline = start + budget_s
            plan = longest(costs, field.deadline - trials.clock(), repetitions, len(rates))
        with _shown(progress) as (to_come, field.tell):
            to_come(plan.rounds)
            try:
                began = trials.clock()
                best = search(field, given, split, list(about), rates, plan, notes)
                if field.deadline is not None and len(rates) > 1:
                    # The search has shown how long steps really take.
                    costs = costs.times((trials.clock() - began) / plan.search_s(costs))
                    plan = longest(costs, field.deadline - trials.clock(), repetitions, 1)
                    to_come(plan.rounds)
                finished = repeat(field, given, split, best, plan, seed, notes)
            except TimeIsUp:
                finished = []
        if not finished:
            raise ValueError(
                f"the time was up before one repetition was through: steps took longer than the "
                f"{1e3 * costs.round_s:.3g} ms that were measured at first for one of each candidate. Is the "
                "machine busy with something else? Give more time, or steps"
            )
    if not given.makes and first is model:
        notes.append(
            "every repetition starts from the weights of the model; give a function that makes models for "
            "a verdict that holds for other initial weights, too"
        )
    return _choice(
        field, about, not_tried, best, finished, plan, trials.clock() - start, confidence, split, notes
    )


def _check_numbers(
    batch_size: int,
    budget_s: float | None,
    steps: int | None,
    repetitions: int,
    rates: Sequence[float],
    order: str,
    examples: int | None,
    groups: int,
    confidence: float,
) -> None:
    if (budget_s is None) == (steps is None):
        raise ValueError("give either budget_s, seconds for everything, or steps of each trial")
    counts = {"batch_size": batch_size, "repetitions": repetitions, "groups": groups}
    counts |= {name: v for name, v in (("steps", steps), ("examples", examples)) if v is not None}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if budget_s is not None and not budget_s > 0:
        raise ValueError(f"budget_s must be above 0, got {budget_s}")
    if not rates or len(set(rates)) < len(rates) or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"rates must be positive and different from each other, got {tuple(rates)}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def _choice(
    field: Field,
    about: Mapping[str, str],
    not_tried: Sequence[tuple[str, str]],
    rates: Mapping[str, float],
    finished: Sequence[Mapping[str, Trial]],
    plan: Plan,
    seconds: float,
    confidence: float,
    split: Split,
    notes: Sequence[str],
) -> Choice:
    tried = []
    for name in about:
        of = [repetition[name] for repetition in finished]
        tried.append(
            Tried(
                name,
                about[name],
                rates[name],
                median([trial.step_s for trial in of]),
                tuple(plan.points),
                tuple(tuple(score for _, _, score in trial.scores) for trial in of),
                tuple(tuple(spent for _, spent, _ in trial.scores) for trial in of),
                sum(trial.diverged is not None for trial in of),
            )
        )
    higher = field.judge.higher_is_better
    standing = {one.name: one.final for one in tried if not one.diverged}
    verdict = judged(standing, higher, confidence)
    sign = 1 if higher else -1
    tried.sort(key=lambda one: (bool(one.diverged), -sign * math.fsum(one.final)))
    choice = Choice(
        tried=tuple(tried),
        not_tried=tuple(not_tried),
        verdict=verdict,
        score=field.judge.score,
        higher_is_better=higher,
        batch_size=field.settings.batch_size,
        steps=plan.steps,
        repetitions=len(finished),
        num_held_out=split.num_held_out,
        seconds=seconds,
        confidence=confidence,
        settings=field.settings,
        notes=tuple(notes),
    )
    if choice.fastest_to_score not in (None, verdict.best):
        more = f"in equal time {choice.fastest_to_score} is ahead, as its steps are shorter"
        choice = replace(choice, notes=(*choice.notes, more))
    return choice


@contextmanager
def _shown(progress: bool) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Two functions: one is told how many steps are to come, one of steps taken; shown if asked for."""
    if not progress:
        yield (lambda steps: None), (lambda steps: None)
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError('progress=True draws with rich: pip install "batchnorm[train]"') from error
    columns = (
        TextColumn("choose"),
        BarColumn(),
        TextColumn("{task.completed} of {task.total} steps of each"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        yield (
            lambda steps: bar.update(task, total=bar.tasks[0].completed + steps),
            lambda steps: bar.advance(task, steps),
        )
