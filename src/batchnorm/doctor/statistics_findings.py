"""Running statistics that do not fit the data, a finding for each cause."""

import math

import torch
from torch import nn

from batchnorm.doctor.causes import SIGNED_MISFIT, batch_noise, cause_of
from batchnorm.doctor.diagnosis import Effect, Finding
from batchnorm.doctor.examination import Examination
from batchnorm.doctor.fit import Fit, is_initial, leftover
from batchnorm.doctor.observe import norms_of
from batchnorm.layers import adopt


def find(exam: Examination) -> list[Finding]:
    """All findings about statistics, one for each cause."""
    causes: dict[str, list[str]] = {}
    for name in exam.fits:
        cause = cause_of(exam, name)
        if cause:
            causes.setdefault(cause, []).append(name)
    found = []
    for cause, names in causes.items():
        if cause not in ("other-domain", "changed-weights"):
            names = sorted(names, key=lambda name: -exam.fits[name].off)
        found.append(_DESCRIBED[cause](exam, tuple(names)))
    return found


def _by_recalibration(exam: Examination, names: tuple[str, ...]) -> Effect:
    after = exam.gap_with_population(names)
    return Effect(exam.gap.what, exam.gap.value, after.value)


def _numbers(fit: Fit) -> dict[str, float]:
    return {"mean_off": fit.mean_off, "std_off": fit.std_off}


def _misfit(fit: Fit) -> str:
    if not fit.is_finite:
        return f"the stored statistics are not finite, or a variance is negative (channel {fit.worst} first)"
    return (
        f"stored means are {fit.mean_off:.2g} deviations from the data's, stored deviations off by a factor "
        "of "
        f"{math.exp(fit.std_off):.2g} (root mean square over channels)"
    )


def _poisoned(exam: Examination, names: tuple[str, ...]) -> Finding:
    fit = exam.fits[names[0]]
    ratio = float(fit.log_ratio.median().exp())
    inflated = f"; half of the deviations are over {ratio:.3g} times too large" if fit.is_finite else ""
    return Finding(
        "poisoned-statistics",
        "wrong",
        names,
        f"{_misfit(fit)}{inflated}: a batch that was not finite, or far outside the rest, went into them",
        {**_numbers(fit), "median_ratio": ratio},
        "bn.recalibrate(model, batches); bn.commit_on_step, or our layers, keep such batches out from then "
        "on",
        _by_recalibration(exam, names),
    )


def _stale(exam: Examination, names: tuple[str, ...]) -> Finding:
    layer, fit = exam.layers[names[0]], exam.fits[names[0]]
    weight = leftover(layer)
    updates = 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    why = (
        "they are still the initial ones"
        if is_initial(layer)
        else f"after {updates} updates with momentum {layer.momentum} the initial ones weigh {weight:.1%}"
    )
    return Finding(
        "stale-statistics",
        "wrong",
        names,
        f"{_misfit(fit)}: {why}",
        {**_numbers(fit), "leftover": weight, "updates": updates},
        "bn.recalibrate(model, batches), or momentum=None or a larger momentum for short trainings",
        _by_recalibration(exam, names),
    )


def _momentum(exam: Examination, names: tuple[str, ...]) -> Finding:
    layer, fit = exam.layers[names[0]], exam.fits[names[0]]
    noise = batch_noise(exam, names[0])
    return Finding(
        "momentum",
        "wrong",
        names,
        f"{_misfit(fit)}, as those of a single batch are (noise {noise:.2g}): momentum {layer.momentum} "
        "lets the last "
        "batch outweigh all others. In PyTorch momentum is the weight of the newest batch",
        {**_numbers(fit), "momentum": float(layer.momentum), "noise": noise},
        f"momentum={max(0.01, min(0.1, 1 - layer.momentum)):.2g}, and bn.recalibrate(model, batches) now",
        _by_recalibration(exam, names),
    )


def _averaged_weights(exam: Examination, names: tuple[str, ...]) -> Finding:
    fit = exam.fits[names[0]]
    return Finding(
        "averaged-weights",
        "wrong",
        names,
        f"{_misfit(fit)}: the weights are an average over training, and the statistics belong to others",
        _numbers(fit),
        "bn.recalibrate(averaged, batches) after the last update of the average",
        _by_recalibration(exam, tuple(exam.fits)),
    )


def _dropout(exam: Examination, names: tuple[str, ...]) -> Finding:
    assert exam.dropped is not None
    fit = exam.fits[names[0]]
    moments, quiet = exam.dropped.seen[names[0]].moments, exam.seen[names[0]].moments
    ratio = float((moments.var / quiet.var.clamp(min=1e-300)).median().sqrt())
    return Finding(
        "dropout-before",
        "wrong",
        names,
        f"{_misfit(fit)}, but they fit the data with dropout on, which changes deviations by a factor of "
        f"{ratio:.3g} "
        "(median): a dropout before the layer shifts its variance between training and inference",
        {**_numbers(fit), "dropout_ratio": ratio},
        "put dropout behind the last normalization; for this model, bn.recalibrate(model, batches), which "
        "runs "
        "without dropout",
        _by_recalibration(exam, tuple(exam.fits)),
    )


def _half(exam: Examination, names: tuple[str, ...]) -> Finding:
    layer, fit = exam.layers[names[0]], exam.fits[names[0]]
    dtype = layer.running_mean.dtype
    smallest = torch.finfo(dtype).eps / 2

    def widened(model: nn.Module) -> None:
        for norm in norms_of(model).values():
            adopt(norm)
        exam.recalibrate(model)

    able = all(
        type(m).__module__.startswith(("torch.nn.modules.batchnorm", "batchnorm."))
        for m in exam.layers.values()
    )
    after = exam.gap_after(widened) if able else None
    return Finding(
        "half-precision",
        "wrong" if fit.off > SIGNED_MISFIT else "risk",
        names,
        f"statistics are kept in {str(dtype).removeprefix('torch.')}: an update that changes one by less "
        "than "
        f"{smallest:.1%} is rounded away, so they stop short of the data's; {_misfit(fit)}",
        {**_numbers(fit), "roundoff": smallest},
        "our layers (bn.accelerate, or bn.convert(model, to='plain')), whose statistics stay in float32, "
        "then "
        "bn.recalibrate(model, batches)",
        None if after is None else Effect(exam.gap.what, exam.gap.value, after.value),
    )


def _domain(exam: Examination, names: tuple[str, ...]) -> Finding:
    fit = exam.fits[names[0]]
    return Finding(
        "other-domain",
        "wrong",
        names,
        f"{_misfit(fit)}, from the first layer on: the data are not like those that the statistics come from",
        _numbers(fit),
        "if these are the data to serve: bn.recalibrate(model, batches of them). If they are the training "
        "data, the "
        "inputs are prepared differently now, or the weights were changed after the statistics",
        _by_recalibration(exam, tuple(exam.fits)),
    )


def _changed(exam: Examination, names: tuple[str, ...]) -> Finding:
    fit = exam.fits[names[0]]
    first = next(iter(exam.fits))
    return Finding(
        "changed-weights",
        "wrong",
        names,
        f"{_misfit(fit)}, while those of {first!r}, which the data reach first, fit: the weights between "
        "were changed "
        "after the statistics were taken (averaged, pruned, quantized, or loaded from another file)",
        {**_numbers(fit), "first_off": exam.fits[first].off},
        "bn.recalibrate(model, batches)",
        _by_recalibration(exam, tuple(exam.fits)),
    )


_DESCRIBED = {
    "poisoned-statistics": _poisoned,
    "stale-statistics": _stale,
    "momentum": _momentum,
    "averaged-weights": _averaged_weights,
    "dropout-before": _dropout,
    "half-precision": _half,
    "other-domain": _domain,
    "changed-weights": _changed,
}
