"""Moments that layers compute anyhow, while each batch is normalized by itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import Normalization
from batchnorm.layers.adopt import OURS, borrow, release
from batchnorm.moments import Moments

_NAME = "collected"


@contextmanager
def collected(layers: dict[str, _BatchNorm], record: Callable[[str, Moments], None]) -> Iterator[set[str]]:
    """Inside, layers in training mode give the moments of their batches to ``record``, and keep their own.

    Layers of `torch.nn` are ours meanwhile. What waits for an optimizer goes on waiting.

    Args:
        layers: By path.
        record: Called with the path and flat float64 moments.

    Yields:
        The paths of the layers that do so. Others, of classes that are neither ours nor torch's own, are
        left as they are.
    """
    able = {name: layer for name, layer in layers.items() if _is_able(layer)}
    waiting = {name: layer.__dict__.get("pending") for name, layer in able.items()}
    try:
        for name, layer in able.items():
            borrow(layer, _NAME).pending = _Taker(name, layer.running_mean, record)  # type: ignore[assignment]
        yield set(able)
    finally:
        for name, layer in able.items():
            assert isinstance(layer, Normalization)
            layer.__dict__.pop("pending", None)
            if waiting[name] is not None:
                layer.pending = waiting[name]
            release(layer, _NAME)


def _is_able(layer: _BatchNorm) -> bool:
    # In half precision torch's layers keep half-precision buffers, which a loan would replace.
    wide = layer.running_mean.dtype in (torch.float32, torch.float64)
    return isinstance(layer, Normalization) or (type(layer) in OURS and wide)


class _Taker:
    """Stands where `layers.pending.Pending` does, and passes each batch's moments on."""

    def __init__(self, name: str, like: Tensor, record: Callable[[str, Moments], None]) -> None:
        self.name, self.record = name, record
        self.like = like.detach().flatten()

    def blank(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Running statistics that become those of the next batch: all zeros, and a momentum of 1."""
        mean, var = self.like.new_zeros(2, self.like.numel()).unbind()
        return mean, var, torch.zeros((), dtype=torch.int64), 1.0

    def take_blank(self, blank: tuple[Tensor, Tensor, Tensor, float], count: int) -> None:
        """Pass on what the kernel wrote into `blank`'s."""
        mean, var, num_moves, _ = blank
        if not num_moves.item():  # not finite
            mean = var = torch.full_like(mean, torch.nan)
        self._pass_on(Moments(mean, var * ((count - 1) / max(count, 1)), count))

    def take(self, moments: Moments, is_silent: bool = False) -> bool:
        """Pass on the moments of a batch; always taken."""
        self._pass_on(moments)
        return True

    def _pass_on(self, moments: Moments) -> None:
        self.record(self.name, moments.map(lambda t: t.detach().double()).flat())


def ignored(layers: dict[str, _BatchNorm]) -> Any:
    """Inside, layers in training mode keep their own statistics, and nobody is told of their batches."""
    return collected(layers, lambda name, moments: None)
