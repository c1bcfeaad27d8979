"""Running statistics that do not fit the data: each layer's misfit is put down to one cause."""

import math

import torch
import torch.distributed as dist
from torch import nn

from batchnorm.doctor.diagnosis import Effect, Finding
from batchnorm.doctor.examination import Examination
from batchnorm.doctor.fit import Fit, compare, fit_of, is_initial, leftover, without_leftover
from batchnorm.doctor.observe import norms_of
from batchnorm.layers import adopt
from batchnorm.statistics import recalibrate
from batchnorm.surgery.models import copied

# Running averages of a network that still learns lag behind it by a tenth of a deviation or so.
MISFIT = 0.25
# With a second sign that points to the same cause, less will do.
SIGNED_MISFIT = 0.1
# Initial statistics that weigh less than this explain no misfit.
LEFTOVER = 0.02
# No change of the data is likely to make all deviations of a layer ten times smaller, but for one:
# all values divided by the same number.
INFLATED = math.log(10)
UNLIKE_CALLS = 0.5
SORTED = 3.0
_HALF = (torch.float16, torch.bfloat16)


def find(exam: Examination) -> list[Finding]:
    """All findings about statistics, one for each cause."""
    causes: dict[str, list[str]] = {}
    for name in exam.fits:
        cause = _cause(exam, name)
        if cause:
            causes.setdefault(cause, []).append(name)
    found = []
    for cause, names in causes.items():
        if cause not in ("other-domain", "changed-weights"):
            names = sorted(names, key=lambda name: -exam.fits[name].off)
        found.append(_DESCRIBED[cause](exam, tuple(names)))
    return [*found, *_unlike_uses(exam), *_ranks(exam)]


def _cause(exam: Examination, name: str) -> str:
    layer, fit = exam.layers[name], exam.fits[name]
    if layer.running_mean.dtype in _HALF or layer.running_var.dtype in _HALF:
        return "half-precision"
    if not fit.is_finite:
        return "poisoned-statistics"
    if fit.off < SIGNED_MISFIT or name in unlike_calls(exam):
        return ""
    if _averaged(exam, name):
        return "averaged-weights"
    if is_initial(layer) or leftover(layer) > LEFTOVER:
        explained = without_leftover(layer, exam.seen[name].moments)
        if explained is None or is_initial(layer) or explained.off < 0.6 * fit.off:
            return "stale-statistics"
    if layer.momentum is not None and layer.momentum >= 0.5 and fit.off < 5 * _batch_noise(exam, name):
        return "momentum"
    if float(fit.log_ratio.median()) > INFLATED and not _is_scaled(exam, name):
        return "poisoned-statistics"
    if exam.dropped is not None and name in exam.dropped.seen:
        with_dropout = fit_of(layer, exam.dropped.seen[name].moments)
        if with_dropout.off < 0.5 * fit.off:
            return "dropout-before"
    lag = _batch_noise(exam, name) * math.sqrt((layer.momentum or 0.0) / (2 - (layer.momentum or 0.0)))
    if fit.off < max(MISFIT, 4 * lag):
        return ""
    first = next(iter(exam.fits))
    return "other-domain" if exam.fits[first].off >= SIGNED_MISFIT else "changed-weights"


def _batch_noise(exam: Examination, name: str) -> float:
    seen = exam.came.seen.get(name, exam.seen[name])
    return seen.noise(exam.layers[name].eps)


def _averaged(exam: Examination, name: str) -> bool:
    parts = name.split(".")
    above = [exam.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    return any(isinstance(m, torch.optim.swa_utils.AveragedModel) or hasattr(m, "n_averaged") for m in above)


def _is_scaled(exam: Examination, name: str) -> bool:
    """Whether the layer's data are those of its statistics divided by one number."""
    layer, fit = exam.layers[name], exam.fits[name]
    scale = fit.log_ratio.median().exp()
    truth = exam.seen[name].moments
    scaled = compare(
        layer.running_mean.double().flatten() / scale,
        layer.running_var.double().flatten() / scale.square(),
        truth,
        layer.eps,
    )
    return scaled.off < MISFIT


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
    noise = _batch_noise(exam, names[0])
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


def unlike_calls(exam: Examination) -> dict[str, float]:
    """Layers that are called several times with unlike inputs, and how far the calls are apart."""
    found = {}
    for name, seen in exam.seen.items():
        if len(seen.calls) < 2:
            continue
        whole, eps = seen.moments, exam.layers[name].eps
        apart = max(compare(call.mean, call.unbiased(), whole, eps).off for call in seen.calls)
        if apart > UNLIKE_CALLS:
            found[name] = apart
    return found


def _unlike_uses(exam: Examination) -> list[Finding]:
    apart = unlike_calls(exam)
    if not apart:
        return []
    names = tuple(sorted(apart, key=lambda name: -apart[name]))
    after = exam.gap_after(lambda model: _separated(exam, model, names))
    seen = exam.seen[names[0]]
    return [
        Finding(
            "shared-layer",
            "wrong",
            names,
            f"called {len(seen.calls)} times in a forward pass, with inputs up to {apart[names[0]]:.2g} "
            "deviations from "
            "what they are together: training normalizes each call by itself, inference all of them by one "
            "average",
            {"apart": apart[names[0]], "calls": len(seen.calls)},
            "a normalization of its own for each use (γ and β may stay shared)",
            Effect(exam.gap.what, exam.gap.value, after.value),
        )
    ]


def _separated(exam: Examination, model: nn.Module, names: tuple[str, ...]) -> None:
    """Give each call of these layers the statistics of that call, as separate layers would have."""
    exam.recalibrate(model)
    calls = dict.fromkeys(names, 0)
    model.register_forward_pre_hook(lambda *_: calls.update(dict.fromkeys(names, 0)))
    for name in names:

        def enter(layer: nn.Module, _: object, name: str = name) -> None:
            own = exam.seen[name].calls
            moments = own[min(calls[name], len(own) - 1)]
            calls[name] += 1
            if not layer.training:
                layer.running_mean.copy_(moments.mean.view_as(layer.running_mean))
                layer.running_var.copy_(moments.unbiased().view_as(layer.running_var))

        model.get_submodule(name).register_forward_pre_hook(enter)


def _ranks(exam: Examination) -> list[Finding]:
    if exam.group is None:
        return []
    apart = _apart(exam, exam.model)
    names = tuple(sorted((n for n, off in apart.items() if off > SIGNED_MISFIT), key=lambda n: -apart[n]))
    if not names:
        return []
    cured = copied(exam.model)
    recalibrate(cured, exam.data, forward=exam.forward, group=exam.group, method="pooled")
    return [
        Finding(
            "ranks-disagree",
            "wrong",
            names,
            f"running statistics differ between ranks by up to {apart[names[0]]:.2g} deviations: each rank "
            "has seen its "
            "own data only, and evaluating or saving one of them takes its view for the whole",
            {"apart": apart[names[0]], "ranks": dist.get_world_size(exam.group)},
            "bn.recalibrate(model, batches, group=group) before evaluating and saving, which pools by count",
            Effect("distance between ranks", apart[names[0]], _apart(exam, cured)[names[0]]),
        )
    ]


def _apart(exam: Examination, model: nn.Module) -> dict[str, float]:
    """Largest distance, over ranks, of a layer's statistics from those of rank 0."""
    found = {}
    for name, layer in norms_of(model).items():
        if layer.running_mean is None:
            continue
        mine = torch.stack([layer.running_mean.double().flatten(), layer.running_var.double().flatten()])
        all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(exam.group))]
        dist.all_gather(all_ranks, mine, group=exam.group)
        std = (all_ranks[0][1] + layer.eps).clamp(min=1e-300).sqrt()
        found[name] = max(
            max(
                float(((other[0] - all_ranks[0][0]) / std).square().mean().sqrt()),
                float(((other[1] + layer.eps).clamp(min=1e-300).sqrt() / std).log().square().mean().sqrt()),
            )
            for other in all_ranks
        )
    return found
