"""Before the trials: what gives scores, which candidates run at all, and how long their steps take."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn

from batchnorm.choosing import trial as trials
from batchnorm.choosing.candidates import Unsuited, build
from batchnorm.choosing.field import Field, seed_all
from batchnorm.choosing.plan import Costs
from batchnorm.choosing.scoring import Judge, Loss, Metric, are_classes, moved
from batchnorm.choosing.split import Split
from batchnorm.choosing.trial import Trial
from batchnorm.doctor.data import run_batch
from batchnorm.statistics.feeding import Forward
from batchnorm.surgery.models import copied


def judge_of(
    model: nn.Module,
    split: Split,
    loss: Loss | None,
    forward: Forward | None,
    metric: Metric | None,
    higher_is_better: bool,
) -> Judge:
    """What gives scores: the metric, or accuracy where the model's outputs are class scores, or the loss."""
    if metric is not None:
        return Judge(split.held_out, loss, forward, metric, "metric", higher_is_better)
    probe = copied(model).eval()
    device = next((p.device for p in probe.parameters()), torch.device("cpu"))
    batch = moved(split.held_out.take(split.at(0)[1][:2]), device)
    with torch.no_grad():
        classes = are_classes(run_batch(probe, batch, 0, forward), batch)
    score: Any = "accuracy" if classes else "loss"
    return Judge(split.held_out, loss, forward, None, score, score == "accuracy")


def first_steps(
    field: Field,
    model: nn.Module,
    split: Split,
    names: Sequence[str],
    rate: float,
    seed: int,
    probe_s: float,
) -> tuple[dict[str, str], list[tuple[str, str]], Costs]:
    """Every candidate's first steps on a copy: whether it runs at all, and how long they take.

    Args:
        field: What trials have in common.
        model: Whose copies they are.
        split: Gives the batches.
        names: Of candidates.
        rate: Learning rate.
        seed: Of everything that is drawn.
        probe_s: Seconds for steps of all of them; three of each are taken at least.

    Returns:
        What is in each that runs, in words; name and reason of the others; and what was measured.

    Raises:
        ValueError, TypeError, RuntimeError: What the first one raised, if none runs.
    """
    batches, held_out = split.at(seed)
    seed_all(seed)
    start = trials.clock()
    loaded = [split.examples.take(batches.at(step)) for step in range(4)]
    batch_s = (trials.clock() - start) / len(loaded)
    about: dict[str, str] = {}
    not_tried: list[tuple[str, str]] = []
    step_s, evaluation_s = {}, []
    failed: Exception | None = None
    for name in names:
        try:
            built = build(name, model, field.settings)
        except Unsuited as reason:
            not_tried.append((name, str(reason)))
            continue
        trial = Trial(built.model, field.make_optimizer, rate, seed, field.loss, field.forward)
        try:
            trial.advance([moved(loaded[0], trial.device)])  # compiles what is to be compiled
            each_s = _probed(trial, loaded[1:], probe_s / len(names))
            start = trials.clock()
            trial.evaluate(field.judge, held_out)
            evaluation_s.append(trials.clock() - start)
        except (ValueError, TypeError, RuntimeError) as error:
            failed = failed or error
            not_tried.append((name, f"it fails on the first batch: {error}"))
            continue
        about[name], step_s[name] = built.about, each_s
    if not about:
        raise failed or ValueError(
            "no candidate can be tried: " + "; ".join(f"{name}: {reason}" for name, reason in not_tried)
        )
    return about, not_tried, Costs(step_s, fmean(evaluation_s), batch_s)


def _probed(trial: Trial, batches: Sequence[Any], seconds: float) -> float:
    """Mean seconds of a step, over the batches at least once."""
    batches = [moved(batch, trial.device) for batch in batches]
    before, first = trial.seconds, trial.steps
    while trial.steps == first or (trial.seconds - before < seconds and trial.diverged is None):
        trial.advance(batches)
        if trial.diverged is not None:
            break
    return (trial.seconds - before) / max(1, trial.steps - first)
