"""The memory format of a model's images: channels-last where a training step is faster with it."""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from batchnorm.surgery.agreement import backward
from batchnorm.surgery.models import copied, outputs
from batchnorm.surgery.proof import allowed, largest_difference

_WORTH_IT = 0.95
"""Channels-last is taken when a step takes at most this share of the time: less is within noise."""
_NUM_ROUNDS = 5


@dataclass(frozen=True)
class Layout:
    """Which memory format a model got, and why.

    Attributes:
        channels_last: Whether its parameters are channels-last now.
        reason: In words.
        contiguous_s: Median seconds of a training step as the model was, where measured.
        channels_last_s: Likewise in channels-last.
    """

    channels_last: bool
    reason: str
    contiguous_s: float | None = None
    channels_last_s: float | None = None


def choose(model: nn.Module, args: Sequence[Any] | None, wanted: bool | None) -> Layout:
    """Convert a model to channels-last if that is wanted, or faster on the example.

    Args:
        model: Changed in place: the strides of its parameters, not their values.
        args: Example; ``None`` if there is none.
        wanted: True or false, or ``None`` to measure.
    """
    if wanted is False:
        return Layout(False, "not asked for")
    convolutions = [m for m in model.modules() if isinstance(m, _ConvNd)]
    images = [m for m in convolutions if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    if not images or len(images) < len(convolutions):
        return Layout(False, "only for models with 2-d convolutions and no others")
    if any(_is_channels_last(m.weight) for m in images):
        return Layout(True, "the model is channels-last already")
    if args is None:
        if wanted:
            _convert(model)
        return Layout(bool(wanted), "asked for" if wanted else "not measured without an example")
    twin = _convert(copied(model))
    try:
        miss = largest_difference(copied(model).eval(), twin.eval(), args)
        times = _race(model, twin, args) if wanted is None else None
    except Exception as error:  # such as a view of what is not contiguous any more
        return Layout(False, f"it does not run on the example: {type(error).__name__}: {error}")
    if not miss <= allowed(model):
        return Layout(False, f"outputs differ by {miss:.1e}")
    if times is None:
        _convert(model)
        return Layout(True, "asked for")
    if times[1] <= _WORTH_IT * times[0]:
        _convert(model)
        return Layout(True, "a training step is faster", *times)
    return Layout(False, "a training step is not faster", *times)


def _convert(model: Any) -> nn.Module:
    converted: nn.Module = model.to(memory_format=torch.channels_last)
    return converted


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _race(contiguous: nn.Module, channels_last: nn.Module, args: Sequence[Any]) -> tuple[float, float]:
    """Median seconds of a training step of two models, taken in turns after a first step each."""
    runners = [copied(model).train() for model in (contiguous, channels_last)]
    inputs = [args, tree_map(_to_channels_last, tuple(args))]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn, which in itertools.product(range(_NUM_ROUNDS + 1), (0, 1)):
        start = _now(runners[which])
        with torch.enable_grad():
            backward(outputs(runners[which], inputs[which]))
        if turn:
            seconds[which].append(_now(runners[which]) - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _to_channels_last(value: Any) -> Any:
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=torch.channels_last) if is_image else value


def _now(model: nn.Module) -> float:
    for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return time.perf_counter()
