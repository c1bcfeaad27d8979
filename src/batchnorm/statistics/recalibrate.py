"""Population statistics for a trained network: Algorithm 2, line 10, and its exact form."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from batchnorm.layers import Normalization
from batchnorm.moments import Moments
from batchnorm.statistics.passes import Forward, Pass, Passes
from batchnorm.statistics.recalibration_report import RecalibrationReport, distance, layer_change

METHODS = ("exact", "pooled", "paper")

# Above this relative difference of deviations the report explains why the paper's average is off.
_PAPER_GAP_WORTH_A_NOTE = 0.01


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    group: dist.ProcessGroup | None = None,
    method: str = "exact",
    tolerance: float = 1e-6,
    progress: bool = False,
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

    Args:
        model: Any model with `torch.nn.BatchNorm*` or our layers (or subclasses, or
            ``SyncBatchNorm``). Wrappers for data parallelism are looked through. Left alone, and
            listed in the notes: frozen layers (``layer.frozen``, or one in evaluation mode inside
            a model in training mode) and layers without running statistics.
        batches: Tensors; tuples or lists whose first item is the input; or dicts of keyword
            arguments. They must be on the model's device, and the same in every pass: torch's
            random state is replayed for each of them. A one-shot iterator is kept in a list for
            "exact".
        forward: ``forward(model, batch)`` runs the model on one batch, instead of the above.
        group: Process group of ranks that hold parts of the data, of any size
            (``torch.distributed.group.WORLD`` for all). Moments are merged by count, and every
            rank ends with the same statistics. ``None``: this process alone.
        method: "exact", "pooled" or "paper".
        tolerance: Largest residual, in deviations, that counts as converged. Only data that
            change from pass to pass, or layers that feed themselves, leave one.
        progress: Draw a progress bar (needs rich, in ``batchnorm[train]``).

    Returns:
        Old and new statistics of every layer, passes, residual and notes; ``print`` it. The
        variance stored is unbiased. ``num_batches_tracked`` becomes the number of calls of the
        layer in one pass, so that training on with ``momentum=None`` gives each further batch
        the weight of one of these.

    Raises:
        ValueError: No batch normalization to recalibrate, no batches, an unknown method, values
            that are not finite, fewer than two samples a channel in the data ("pooled", "paper":
            in a batch). The message names batch and layer.
        TypeError: A batch of a kind that only ``forward`` could handle.
        RuntimeError: Batch and model are on different devices, or another rank failed.

    Warns:
        UserWarning: The statistics did not converge.

    Source: Ioffe & Szegedy (2015), Algorithm 2, line 10; Wu & Johnson (2021), section 3, call
    the pooled form "precise" statistics.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be zero or more deviations, got {tolerance}")
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module  # the wrapper would synchronize buffers, or run copies, in every forward
    layers, notes = _choose(model)
    if method == "exact" and isinstance(batches, Iterator):
        batches = list(batches)
    passes = Passes(model, layers, batches, forward=forward, group=group, progress=progress)
    old = {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in layers.items()}
    with torch.no_grad(), _restored(model):
        if method == "exact":
            population, last, residual = _settle(passes, tolerance)
            statistics = {name: (m.mean, m.unbiased()) for name, m in population.items()}
        else:
            last, residual = _train_through(passes, average=method == "paper"), None
            statistics = {name: (m.mean, m.unbiased()) for name, m in last.moments.items()}
        gaps = _paper_gaps(layers, last)
        if method == "paper":
            halves = {name: m.mean.chunk(2) for name, m in last.averages.items()}
            statistics = {name: (mean, var) for name, (mean, var) in halves.items()}
        for name in statistics:
            _check_count(name, last.moments[name])
    changes = []
    for name, (mean, var) in statistics.items():
        layer = layers[name]
        _store(layer, mean, var)
        if layer.num_batches_tracked is not None:  # checkpoints older than torch 0.4 have none
            layer.num_batches_tracked.fill_(last.num_calls[name])
        changes.append(
            layer_change(
                name,
                old=old[name],
                new=(layer.running_mean.clone(), layer.running_var.clone()),
                eps=layer.eps,
                count=int(last.moments[name].count),
                num_calls=last.num_calls[name],
                paper_gap=gaps.get(name),
            )
        )
    unreached = [name for name in layers if name not in statistics]
    notes += [f"{name!r} unchanged: no batch reached it in evaluation mode" for name in unreached]
    notes += _gap_notes(gaps)
    converged = residual is None or residual <= tolerance
    if not converged:
        notes.append(
            f"not converged: run on the stored statistics, the model gives others ({residual:.1e} deviations "
            f"away, tolerance {tolerance:.1e}). Either the batches differ from pass to pass (give a list, or "
            "fix what shuffles or augments them), or a layer is called several times and feeds itself"
        )
        warnings.warn(notes[-1], stacklevel=2)
    return RecalibrationReport(
        method=method,
        layers=tuple(changes),
        num_batches=last.num_batches,
        num_passes=passes.num_done,
        residual=residual,
        converged=converged,
        notes=tuple(notes),
    )


def _choose(model: nn.Module) -> tuple[dict[str, _BatchNorm], list[str]]:
    """The layers to recalibrate, and a note on each batch normalization that is not one of them."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no batch normalization (torch.nn.BatchNorm*, or a subclass): "
            "there are no statistics to recalibrate"
        )
    layers, notes = {}, []
    for name, layer in norms.items():
        if is_lazy(layer.running_mean):
            raise ValueError(f"layer {name!r} is still lazy: run one batch through the model first")
        if layer.running_mean is None or not layer.track_running_stats:
            notes.append(f"{name!r} left alone: it keeps no running statistics and uses each batch's own")
        elif isinstance(layer, Normalization) and layer.frozen:
            notes.append(f"{name!r} left alone: it is frozen")
        elif model.training and not layer.training:
            notes.append(f"{name!r} left alone: in evaluation mode inside a model in training mode (frozen)")
        else:
            layers[name] = layer
    if not layers:
        raise ValueError("no layer to recalibrate: " + "; ".join(notes))
    return layers, notes


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode inside; flags and statistics as they were outside."""
    # Flags are set one by one: `model.eval()` would run, and be at the mercy of, overridden `train`.
    flags = [(module, module.training) for module in model.modules()]
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)
        for module, flag in flags:
            module.training = flag


def _settle(passes: Passes, tolerance: float) -> tuple[dict[str, Moments], Pass, float]:
    """Settle the layers in the order in which data reach them; returns statistics and last pass."""
    layers = passes.layers
    known: dict[str, Moments] = {}
    while len(known) < len(layers):
        found = passes.run([name for name in layers if name not in known], stop=True)
        if not found.moments:
            break  # nothing reaches the others
        for name, moments in found.moments.items():
            _settle_on(layers[name], moments)
        known |= found.moments
    last = passes.run(known)
    residual = best = _residual(layers, known, last)
    result = known
    # Exact, unless a layer was called again after it had been settled. Then all the layers move on
    # together, for as long as it helps: a change may grow before it has gone through every layer.
    once_each = all(calls == last.num_batches for calls in last.num_calls.values())
    patience = 0 if once_each else len(known) + 1
    while best > tolerance and patience:
        known = {name: last.moments.get(name, moments) for name, moments in known.items()}
        for name, moments in known.items():
            _settle_on(layers[name], moments)
        last = passes.run(known)
        residual = _residual(layers, known, last)
        patience -= 1
        if residual < best:
            best, result, patience = residual, known, len(known) + 1
    return {name: result[name] for name in layers if name in last.moments}, last, best


def _residual(layers: dict[str, _BatchNorm], known: dict[str, Moments], last: Pass) -> float:
    return max(distance(known[name], moments, layers[name].eps) for name, moments in last.moments.items())


def _train_through(passes: Passes, *, average: bool) -> Pass:
    """One pass in which every batch is normalized by itself."""
    for layer in passes.layers.values():
        layer.training = True
    return passes.run(passes.layers, average=average)


def _settle_on(layer: _BatchNorm, moments: Moments) -> None:
    # The biased variance, for only while we are at it: one batch of all the data would be
    # normalized by that. What is stored in the end is unbiased.
    _store(layer, moments.mean, moments.var)


def _store(layer: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    layer.running_mean.copy_(mean.view_as(layer.running_mean))
    layer.running_var.copy_(var.view_as(layer.running_var))


def _check_count(name: str, moments: Moments) -> None:
    if moments.count < 2:
        raise ValueError(
            f"layer {name!r}: {int(moments.count)} sample(s) a channel in all the data; the variance of a "
            "population needs at least two. Give more data"
        )


def _paper_gaps(layers: dict[str, _BatchNorm], last: Pass) -> dict[str, float]:
    """Largest relative difference of deviations, the paper's average against the pooled samples."""
    gaps = {}
    for name, average in last.averages.items():
        pooled, eps = last.moments[name].unbiased() + layers[name].eps, layers[name].eps
        averaged = average.mean.chunk(2)[1] + eps
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
