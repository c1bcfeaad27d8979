"""Population statistics for a trained network: Algorithm 2, line 10, and its exact form."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, SequentialSampler

from batchnorm.statistics.choose import choose, mark_settled, restored, unwrapped
from batchnorm.statistics.feeding import Forward
from batchnorm.statistics.install import install
from batchnorm.statistics.methods import METHODS, Found, find, standard_errors
from batchnorm.statistics.metric import Metric, measured
from batchnorm.statistics.passes import Pass, Passes
from batchnorm.statistics.recalibration_report import RecalibrationReport

# Above this relative difference of deviations the report explains why the paper's average is off.
_PAPER_GAP_WORTH_A_NOTE = 0.01

# From fewer batches their spread is not known well enough to stop by it.
_FEWEST_BATCHES = 16


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    group: dist.ProcessGroup | None = None,
    method: str = "exact",
    tolerance: float = 1e-6,
    progress: bool = False,
    standard_error: float | None = None,
    metric: Metric | None = None,
    higher_is_better: bool = True,
    keep_better: bool = False,
) -> RecalibrationReport:
    """Replace the running statistics of every batch normalization by those of the data, in place.

    Nothing else is touched: parameters, training flags, ``momentum``, hooks and torch's random
    state are afterwards what they were, and if anything raises, so are the statistics. While the
    data pass through, dropout and every other module is in evaluation mode.

    - ``method="exact"``: what training mode would compute for all the data as one single batch. The
      layers are settled one after the other in the order in which the data reach them: each batch
      runs, on the statistics settled so far, up to the first layer that is not settled, and that
      layer gets the count-weighted moments of all the batches. So any split of the data, into
      batches of one even, gives the same result. For L layers this takes L passes that end half
      way on average, and a last whole one that measures the ``residual``. (Moving all layers in
      every pass would take as many, and in between the errors of early layers grow exponentially
      with depth.) A layer that is called several times gets the moments of all its calls, and all
      layers then move on together until they agree with themselves.
    - ``method="pooled"``: one pass, in which every batch is normalized by itself, as in training;
      the count-weighted moments of all the batches. Close to exact for large, well mixed batches.
    - ``method="paper"``: one pass likewise, then literally the averages of batch means and of
      unbiased batch variances, E[μ_B] and m/(m − 1)·E[σ²_B], each call of a layer weighing the
      same. Misses the variance *between* batches and weighs small batches too much; the report
      says by how much for each layer.

    "pooled" and "paper" need two samples a channel in every batch.

    That new statistics serve better than old ones is often expected and often not so. Give a
    ``metric`` to see it, and ``keep_better=True`` to go back to the old ones where they were better.

    Args:
        model: Any model with `torch.nn.BatchNorm*` or our layers (or subclasses, or
            ``SyncBatchNorm``). Wrappers for data parallelism and `AveragedModel` are looked
            through. Left alone, and listed in the notes: frozen layers (``layer.frozen``, or one in
            evaluation mode inside a model in training mode) and layers without running statistics.
        batches: Tensors; tuples or lists whose first item is the input; or dicts of keyword
            arguments. They must be on the model's device, and the same in every pass: torch's
            random state is replayed for each of them. What a one-shot iterator gives is kept in
            memory where more than one pass is needed.
        forward: ``forward(model, batch)`` runs the model on one batch, instead of the above.
        group: Process group of ranks that hold parts of the data, of any size
            (``torch.distributed.group.WORLD`` for all). Moments are merged by count, and every
            rank ends with the same statistics. ``None``: this process alone.
        method: "exact", "pooled" or "paper".
        tolerance: Largest residual, in deviations, that counts as converged. Only data that
            change from pass to pass, or layers that feed themselves, leave one.
        progress: Draw a progress bar (needs rich, in ``batchnorm[train]``).
        standard_error: Stop early: use only as many of the first batches as it takes for
            ``report.standard_error`` to be this or less. It is the largest, over layers and
            channels, of the standard errors of the mean, in deviations, and of the deviation,
            relative to it, and comes from how much the batches differ, so that samples within one
            (the locations of an image) may be as alike as they please. The batches themselves have
            to be independent: shuffled. Begins with 16 batches (of each rank) and then takes
            more, anew from the first; 0.01 takes some 10,000 independent samples. ``None``: all.
        metric: ``metric(model)`` returns one number, an accuracy or a loss on data that were not
            used for the statistics; it is called on the network, without wrappers and in evaluation
            mode, before and after, with the same random numbers. With ``group`` the mean over
            ranks counts.
        higher_is_better: True of an accuracy; give false for a loss.
        keep_better: Put the old statistics back where the metric is worse on the new ones.

    Returns:
        Old and new statistics of every layer, passes, residual and notes; ``print`` it. The
        variance stored is unbiased. ``num_batches_tracked`` becomes the number of calls of the
        layer in one pass, so that training on with ``momentum=None`` gives each further batch
        the weight of one of these.

    Raises:
        ValueError: No batch normalization to recalibrate, no batches, an unknown method, values
            that are not finite, fewer than two samples a channel in the data ("pooled", "paper":
            in a batch), a module that is lazy or on the meta device, ``keep_better`` without
            ``metric``. The message names batch and layer.
        TypeError: A batch that does not fit the model's ``forward``, or a metric that is no number.
        RuntimeError: Batch and model are on different devices, or another rank failed.

    Warns:
        UserWarning: The statistics did not converge, or the data ended before ``standard_error``
            was reached.

    Source: Ioffe & Szegedy (2015), Algorithm 2, line 10; Wu & Johnson (2021), section 3, call
    the pooled form "precise" statistics.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be zero or more deviations, got {tolerance}")
    if standard_error is not None and not standard_error > 0:
        raise ValueError(f"standard_error must be above zero deviations, got {standard_error}")
    if keep_better and metric is None:
        raise ValueError("keep_better needs a metric to judge by: pass metric=callable(model) too")
    network = unwrapped(model)
    layers, notes = choose(network)
    before = None if metric is None else measured(metric, model, group)
    passes = Passes(
        network,
        layers,
        batches,
        forward=forward,
        group=group,
        progress=progress,
        again=method == "exact" or standard_error is not None,
    )
    found, errors = _find_within(passes, method, tolerance, standard_error, model)
    gaps = _paper_gaps(layers, found.last)
    changes, outcome, kept_old = install(
        model,
        layers,
        found.statistics,
        found.last,
        errors=errors,
        paper_gaps=gaps,
        metric=metric,
        before=before,
        higher_is_better=higher_is_better,
        keep_better=keep_better,
        group=group,
    )
    mark_settled(model)
    unreached = [name for name in layers if name not in found.statistics]
    notes += [f"{name!r} unchanged: no batch reached it in evaluation mode" for name in unreached]
    notes += _gap_notes(gaps)
    converged = found.residual is None or found.residual <= tolerance
    report = RecalibrationReport(
        method=method,
        layers=changes,
        num_batches=found.last.num_batches,
        num_passes=passes.num_done,
        residual=found.residual,
        converged=converged,
        notes=(*notes, *_unshuffled(batches, found.last)),
        metric=outcome,
        kept_old=kept_old,
    )
    doubts = []
    if not converged:
        doubts.append(
            f"not converged: run on the stored statistics, the model gives others ({found.residual:.1e} "
            f"deviations away, tolerance {tolerance:.1e}). Either the batches differ from pass to pass (give "
            "a list, or fix what shuffles or augments them), or a layer is called several times and feeds "
            "itself"
        )
    if standard_error is not None and not _largest(errors) <= standard_error:
        doubts.append(
            f"the data ended before the standard error was {standard_error:g}: it is {_largest(errors):.2g} "
            f"deviations after {found.last.num_batches} batches. Give more data, or ask for less"
        )
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    return replace(report, notes=(*report.notes, *doubts))


def _find_within(
    passes: Passes, method: str, tolerance: float, target: float | None, model: nn.Module
) -> tuple[Found, dict[str, tuple[float, float]]]:
    """Statistics from as few of the first batches as the target takes, and their standard errors."""
    passes.limit = None if target is None else _FEWEST_BATCHES
    while True:
        with torch.no_grad(), restored(model):
            found = find(passes, method, tolerance)
        errors = standard_errors(passes.layers, found.last)
        if target is None or found.last.exhausted or _largest(errors) <= target:
            return found, errors
        # Errors fall with the root of the number of batches, and are known only roughly so far.
        needed = min(max((_largest(errors) / target) ** 2, 1.25), 4)
        passes.limit = math.ceil(passes.limit * needed)


def _largest(errors: dict[str, tuple[float, float]]) -> float:
    return max(error for pair in errors.values() for error in pair)


def _unshuffled(batches: Iterable[Any], last: Pass) -> list[str]:
    if last.exhausted or not isinstance(batches, DataLoader):
        return []
    if not isinstance(getattr(batches, "sampler", None), SequentialSampler):
        return []
    return [
        f"stopped after the first {last.num_batches} batches of a loader that does not shuffle: the standard "
        "error holds only if the order of its data set is random"
    ]


def _paper_gaps(layers: dict[str, _BatchNorm], last: Pass) -> dict[str, float]:
    """Largest relative difference of deviations, the paper's average against the pooled samples."""
    gaps = {}
    for name, average in last.averages.items():
        pooled, eps = last.moments[name].unbiased() + layers[name].eps, layers[name].eps
        num = len(pooled)
        averaged = average.mean[num : 2 * num] + eps
        gaps[name] = ((averaged / pooled).sqrt() - 1).abs().nan_to_num().max().item()
    return gaps


def _gap_notes(gaps: dict[str, float]) -> list[str]:
    worst = max(gaps, key=gaps.__getitem__, default=None)
    if worst is None or gaps[worst] <= _PAPER_GAP_WORTH_A_NOTE:
        return []
    return [
        f"the paper's average of batch variances gives {worst!r} deviations up to {gaps[worst]:.1%} away "
        "from those of the pooled samples: batches differ in size or in kind (sorted by class?), and the "
        'variance between them is missed. method="pooled" or "exact" has it'
    ]
