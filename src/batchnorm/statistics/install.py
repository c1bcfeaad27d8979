"""Puts new statistics into a model, and takes them out again where they are worse."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.statistics.choose import put_back, saved_statistics, store
from batchnorm.statistics.metric import Metric, MetricChange, measured
from batchnorm.statistics.passes import Pass
from batchnorm.statistics.recalibration_report import LayerChange, layer_change


def install(
    model: nn.Module,
    layers: dict[str, _BatchNorm],
    statistics: dict[str, tuple[Tensor, ...]],
    source: Pass,
    *,
    errors: dict[str, tuple[float, float]],
    paper_gaps: dict[str, float],
    metric: Metric | None,
    before: float | None,
    higher_is_better: bool,
    keep_better: bool,
    group: dist.ProcessGroup | None,
) -> tuple[tuple[LayerChange, ...], MetricChange | None, bool]:
    """Store statistics, measure what they are worth, and say what was done.

    Args:
        model: The model with the layers, in any wrapper.
        layers: By path.
        statistics: What `batchnorm.statistics.choose.store` takes, by path; layers without are left.
        source: The pass that they come from: samples and calls.
        errors: Standard errors of mean and deviation by path.
        paper_gaps: As in `LayerChange`, by path.
        metric: As in `recalibrate`, or ``None``.
        before: The metric on the statistics that the model has now.
        higher_is_better: As in `recalibrate`.
        keep_better: As in `recalibrate`.
        group: As in `recalibrate`.

    Returns:
        The changes in the order of ``layers``, the metric's change, and whether the old statistics
        are back in place. If anything raises, they are, too.
    """
    saved = saved_statistics(layers.values())
    changes: list[LayerChange] = []
    try:
        with torch.no_grad():
            for name, new in statistics.items():
                gap = paper_gaps.get(name)
                changes.append(_put(name, layers[name], new, source, errors[name], gap))
        if metric is None:
            return tuple(changes), None, False
        outcome = MetricChange(before, measured(metric, model, group), higher_is_better)
    except BaseException:
        put_back(saved)
        raise
    kept_old = keep_better and outcome.is_worse
    if kept_old:
        put_back(saved)
    return tuple(changes), outcome, kept_old


def _put(
    name: str,
    layer: _BatchNorm,
    new: tuple[Tensor, ...],
    source: Pass,
    errors: tuple[float, float],
    paper_gap: float | None,
) -> LayerChange:
    old = (layer.running_mean.clone(), layer.running_var.clone())
    store(layer, *new)
    if layer.num_batches_tracked is not None:  # checkpoints older than torch 0.4 have none
        layer.num_batches_tracked.fill_(source.num_calls[name])
    return layer_change(
        name,
        old=old,
        new=(layer.running_mean.clone(), layer.running_var.clone()),
        eps=layer.eps,
        count=int(source.moments[name].count),
        num_calls=source.num_calls[name],
        errors=errors,
        paper_gap=paper_gap,
    )
