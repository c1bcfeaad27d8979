"""How much an example should weigh among the statistics at inference, fitted to batches."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNormPerActivation, EvalNorm
from batchnorm.layers.evalnorm import blended, example_moments
from batchnorm.statistics.choose import restored, unwrapped
from batchnorm.statistics.feeding import Forward, feed, run
from batchnorm.statistics.passes import same_random_numbers

_GRID = 65
_HALVINGS = 40
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class FittedWeight:
    """One layer's weight before and after.

    Attributes:
        name: The layer's path in the model.
        old: Weight before.
        new: Weight that is stored now.
        error_plain: Root mean square distance of what evaluation with weight 0 gives from what a batch
            gives, before γ and β: in deviations.
        error_old: The same with the old weight.
        error_new: The same with the new one.
    """

    name: str
    old: float
    new: float
    error_plain: float
    error_old: float
    error_new: float


@dataclass(frozen=True)
class FittedWeights:
    """What `fit_example_weights` did; ``print`` shows it.

    Attributes:
        layers: Every layer that a batch reached.
        num_batches: Batches that were run.
        notes: Layers that were left alone, each with the reason.
    """

    layers: tuple[FittedWeight, ...]
    num_batches: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        head = f"fitted to {self.num_batches} batches; distance from batch outputs, in deviations"
        rows = [
            f"  {w.name or '(model)'}: weight {w.old:.3g} → {w.new:.3g}; distance {w.error_new:.3g} "
            f"(with {w.old:.3g}: {w.error_old:.3g}, with 0: {w.error_plain:.3g})"
            for w in self.layers
        ]
        return "\n".join([head, *rows, *self.notes])


@dataclass(frozen=True)
class _Batch:
    """Moments of the examples of one batch: shapes (N, C), (N, C) and (N, 1), float64."""

    mean: Tensor
    var: Tensor
    count: Tensor


@torch.no_grad()
def fit_example_weights(
    model: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None
) -> FittedWeights:
    """Give every `batchnorm.layers.EvalNorm` layer the weight that comes closest to training, in place.

    The batches are run as training runs them, each normalized by its own moments. For each layer the
    weight is found with which its evaluation of the same inputs has the smallest mean square distance
    from that: least squares, by layer, in closed form but for one number. Nothing but the weights
    changes: not the statistics, nor any mode.

    Args:
        model: With such layers, ``bn.convert(model, to="evalnorm", batch_size=…)``; its running
            statistics as they are going to be used.
        batches: Of the size that training has, as `batchnorm.recalibrate` takes them; tens of them.
        forward: As in `batchnorm.recalibrate`.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: No such layer with running statistics, no batch reached one, one has a single value
            per channel, or values that are not finite.

    Source: Singh & Shrivastava (2019), arXiv 1904.06031, section 4, who learn the weights by the
    gradient of the same distance during training.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fit_example_weights needs a torch.nn.Module, got {type(model).__name__}")
    network = unwrapped(model)
    layers, notes = _choose(network)
    seen: dict[str, list[_Batch]] = {name: [] for name in layers}
    num_batches = 0
    with restored(network), same_random_numbers(network), ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.training = True
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(_hook(seen[name]), with_kwargs=True).remove)
        for batch in batches:
            run(forward or feed, network, batch, num_batches)
            num_batches += 1
    if not any(seen.values()):
        raise ValueError(f"none of {num_batches} batches reached any of {', '.join(map(repr, layers))}")
    found = []
    for name, layer in layers.items():
        if seen[name]:
            found.append(_fitted(name, layer, seen[name]))
        else:
            notes.append(f"{name!r} unchanged: no batch reached it")
    for weight in found:
        layers[weight.name].example_weight = weight.new
    return FittedWeights(tuple(found), num_batches, tuple(notes))


def _choose(network: nn.Module) -> tuple[dict[str, EvalNorm], list[str]]:
    layers, notes = {}, []
    for name, module in network.named_modules():
        if isinstance(module, EvalNorm):
            if module.running_mean is None:
                notes.append(f"{name!r} left alone: it keeps no running statistics")
            elif module.frozen:
                notes.append(f"{name!r} left alone: it is frozen")
            else:
                layers[name] = module
    if not layers:
        why = ": " + "; ".join(notes) if notes else ""
        raise ValueError(
            f"{type(network).__name__} has no layer whose examples have a weight{why}; "
            "bn.convert(model, to='evalnorm', batch_size=…) makes them"
        )
    return layers, notes


def _hook(seen: list[_Batch]) -> Callable[..., None]:
    def enter(layer: Any, args: Any, kwargs: Any) -> None:
        given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
        x, mask = given["x"], given.get("mask")
        layer._check_input_dim(x)
        if isinstance(layer, BatchNormPerActivation):
            x = x.flatten(1)
        elif layer.channel_dim == -1:
            x = x.movedim(-1, 1)
        x = x.detach().double()
        if mask is not None:
            x = torch.where(mask.unsqueeze(1), x, 0)
        mean, var, count = example_moments(x, mask)
        counts = torch.as_tensor(count, device=x.device).expand(len(x), 1) if mask is None else count
        seen.append(_Batch(mean, var, counts.double()))

    return enter


def _fitted(name: str, layer: EvalNorm, batches: list[_Batch]) -> FittedWeight:
    mean, var = (t.double().flatten() for t in (layer.running_mean, layer.running_var))

    def distance(weight: float) -> float:
        total = sum(_squares(batch, mean, var, layer.eps, weight) for batch in batches)
        return float(total / sum(batch.count.sum() for batch in batches) / len(mean))

    plain = distance(0.0)
    if not plain < float("inf"):
        raise ValueError(f"layer {name!r}: inputs or running statistics that are not finite")
    new = _smallest(distance)
    old = float(layer.example_weight)
    errors = (plain, distance(old), distance(new))
    return FittedWeight(name, old, new, *(error**0.5 for error in errors))


def _squares(batch: _Batch, mean: Tensor, var: Tensor, eps: float, weight: float) -> Tensor:
    """Summed squares of the differences of the normalized samples of a batch, over all channels.

    Within an example and channel both normalizations are linear maps, and the square of their
    difference follows from the example's moments.
    """
    share = batch.count / batch.count.sum().clamp(min=1)
    whole = (share * batch.mean).sum(0)
    within = (share * (batch.var + (batch.mean - whole).square())).sum(0)
    of_batch = (within + eps).rsqrt()
    center, blend = blended(batch.mean, batch.var, batch.count, mean, var, weight)
    scale = (blend + eps).rsqrt()
    slope, start = of_batch - scale, center * scale - whole * of_batch
    squares = slope.square() * batch.var + (slope * batch.mean + start).square()
    return (batch.count * squares).sum()


def _smallest(function: Callable[[float], float]) -> float:
    """Where a function on [0, 1] is smallest: a grid, then golden sections between its neighbours."""
    grid = [i / (_GRID - 1) for i in range(_GRID)]
    values = [function(w) for w in grid]
    best = min(range(_GRID), key=values.__getitem__)
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, _GRID - 1)]
    for _ in range(_HALVINGS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if function(left) <= function(right):
            high = right
        else:
            low = left
    return min((grid[best], (low + high) / 2), key=function)
