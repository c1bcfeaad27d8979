"""Why a layer's running statistics do not fit the data: one cause for each misfit."""

import math

import torch

from batchnorm.doctor.examination import Examination
from batchnorm.doctor.fit import compare, fit_of, is_initial, leftover, without_leftover

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
_HALF = (torch.float16, torch.bfloat16)


def cause_of(exam: Examination, name: str) -> str:
    """The cause of a layer's misfit, or nothing where its statistics fit well enough.

    The order of the questions matters: each takes only what those before it have left.
    """
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
    if layer.momentum is not None and layer.momentum >= 0.5 and fit.off < 5 * batch_noise(exam, name):
        return "momentum"
    if float(fit.log_ratio.median()) > INFLATED and not _is_scaled(exam, name):
        return "poisoned-statistics"
    if exam.dropped is not None and name in exam.dropped.seen:
        with_dropout = fit_of(layer, exam.dropped.seen[name].moments)
        if with_dropout.off < 0.5 * fit.off:
            return "dropout-before"
    lag = batch_noise(exam, name) * math.sqrt((layer.momentum or 0.0) / (2 - (layer.momentum or 0.0)))
    if fit.off < max(MISFIT, 4 * lag):
        return ""
    first = next(iter(exam.fits))
    return "other-domain" if exam.fits[first].off >= SIGNED_MISFIT else "changed-weights"


def batch_noise(exam: Examination, name: str) -> float:
    """Deviation of a batch's mean, in deviations of the samples, for the batches that came."""
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
