"""How far stored statistics are from those of the data, and what would explain the distance."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments


@dataclass(frozen=True)
class Fit:
    """Distances of stored statistics from the data's, of one layer.

    Attributes:
        mean_off: Of the means, in the data's deviations, root mean square over channels.
        std_off: Natural logarithm of stored over true deviation, root mean square.
        log_ratio: The same logarithm by channel, shape (C,).
        worst: The channel that is farthest off.
        is_finite: Whether the stored statistics are finite and the variances not negative.
    """

    mean_off: float
    std_off: float
    log_ratio: Tensor
    worst: int
    is_finite: bool

    @property
    def off(self) -> float:
        """The larger of both."""
        return max(self.mean_off, self.std_off)


def compare(mean: Tensor, var: Tensor, truth: Moments, eps: float) -> Fit:
    """Stored ``mean`` and ``var``, shape (C,), against the moments of the data.

    ``eps`` is inside all deviations, so that constant channels count as little as the layer makes of them.
    """
    sound = bool(mean.isfinite().all() and var.isfinite().all() and (var >= 0).all())
    if not sound:
        wrong = ~(mean.isfinite() & var.isfinite() & (var >= 0))
        return Fit(math.inf, math.inf, torch.full_like(mean, math.inf), int(wrong.nonzero()[0]), False)
    tiny = torch.finfo(torch.float64).tiny
    true_std = (truth.unbiased() + eps).sqrt().clamp(min=tiny)
    move = (mean - truth.mean) / true_std
    log_ratio = ((var + eps).sqrt().clamp(min=tiny) / true_std).log()
    worst = int((move.abs() + log_ratio.abs()).argmax())
    return Fit(_rms(move), _rms(log_ratio), log_ratio, worst, True)


def fit_of(layer: _BatchNorm, truth: Moments) -> Fit:
    """A layer's running statistics against the moments of what it receives."""
    return compare(
        layer.running_mean.double().flatten(), layer.running_var.double().flatten(), truth, layer.eps
    )


def leftover(layer: _BatchNorm) -> float:
    """Weight that the initial statistics, mean 0 and variance 1, still have in the running ones.

    (1 − momentum)^updates; with ``momentum=None``, all of it before the first update and none after.
    """
    updates = 0 if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    if layer.momentum is None:
        return 1.0 if updates == 0 else 0.0
    return (1 - layer.momentum) ** updates


def without_leftover(layer: _BatchNorm, truth: Moments) -> Fit | None:
    """The fit of the running statistics with the initial ones taken out; None if nothing else is there."""
    weight = leftover(layer)
    if weight > 1 - 1e-9:
        return None
    mean = layer.running_mean.double().flatten() / (1 - weight)
    var = (layer.running_var.double().flatten() - weight) / (1 - weight)
    return compare(mean, var.clamp(min=0), truth, layer.eps)


def is_initial(layer: _BatchNorm) -> bool:
    """Whether the running statistics are exactly those of a new layer."""
    return bool((layer.running_mean == 0).all() and (layer.running_var == 1).all())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0
