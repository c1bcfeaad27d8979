"""Moments of a layer's training batches that wait until the optimizer applies their gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from batchnorm.layers.base import Normalization
from batchnorm.moments import Moments

_MOST_WAITING = 64
"""Batches kept one by one; beyond, they are merged, so that a loop without steps fills no memory."""


@dataclass(slots=True)
class _Entry:
    """One batch, or some that were merged.

    Attributes:
        moments: Of the batch.
        num_batches: How many they are.
        is_sound: Whether batches that are not finite have been left out already.
        is_silent: Whether the gradient of this process says nothing of it: the samples are other ranks'.
    """

    moments: Moments
    num_batches: Tensor | int = 1
    is_sound: bool = False
    is_silent: bool = False


class Pending:
    """What a layer hands its moments to, instead of moving its running statistics.

    Moments follow gradients. They wait as long as the gradient of their batch accumulates, move the
    statistics when it is applied (`settle`), and are dropped when it is dropped: a backward pass
    that finds the watched parameter without a gradient, or with zeros, says that those of all
    earlier backward passes were. No device is waited for, but for the CPU itself.

    A copy, or a pickle, of a layer does not take it along.

    Args:
        layer: With running statistics; on the device where it is going to be trained.

    Attributes:
        num_batches: Training batches the layer has seen.
        num_skipped: Of these, how many were left out: not finite, or without two samples.
        num_dropped: Of these, how many were dropped together with their gradient.
        num_moves: How often the statistics moved.
    """

    def __init__(self, layer: Normalization) -> None:
        self.num_batches: Tensor | int = 0
        self.num_skipped: Tensor | int = 0
        self.num_dropped: Tensor | int = 0
        self.num_moves: Tensor | int = 0
        self._waiting: list[_Entry] = []
        self._num_used = 0  # of the waiting: those whose backward pass has begun
        self._box = _Mailbox(layer.no_moments())
        self._hook: Callable[[], None] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()

    @property
    def num_waiting(self) -> Tensor | int:
        """Batches that wait for a step."""
        self._empty_box()
        return sum((entry.num_batches for entry in self._waiting), 0)

    def watch(self, parameter: Tensor | None) -> None:
        """Learn from the gradients of a parameter what becomes of the batches; ``None`` ends it."""
        if self._hook is not None:
            self._hook()
        self._hook = None
        if parameter is not None:
            self._hook = parameter.register_hook(lambda _: self._on_gradient(parameter)).remove

    # Called by the layer.

    def blank(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Running statistics that become those of the next batch: all zeros, and a momentum of 1."""
        like = self._box.moments.mean
        mean, var = like.new_zeros(2, like.numel()).unbind()
        return mean, var, torch.zeros((), dtype=torch.int64), 1.0

    def take_blank(self, blank: tuple[Tensor, Tensor, Tensor, float], count: int) -> None:
        """Take the moments of a batch of ``count`` samples out of what `blank` gave; on the CPU."""
        mean, var, num_moves, _ = blank
        self.num_batches += 1
        if num_moves.item():
            self._append(_Entry(Moments(mean, var * ((count - 1) / count), count), is_sound=True))
        else:
            self.num_skipped += 1

    def take(self, moments: Moments, is_silent: bool = False) -> bool:
        """Take the moments of a batch; false where they cannot wait, as under `torch.func` transforms.

        Args:
            moments: Of the batch.
            is_silent: Whether none of its samples is this process': its gradient is zero anyway.
        """
        if torch.compiler.is_compiling():
            self._box.put(moments)
            return True
        if torch._C._are_functorch_transforms_active():
            return False
        self.num_batches += 1
        self._append(_Entry(moments, is_silent=is_silent))
        return True

    def _append(self, entry: _Entry) -> None:
        self._waiting.append(entry)
        if len(self._waiting) > _MOST_WAITING:
            used, unused = self._waiting[: self._num_used], self._waiting[self._num_used :]
            self._waiting = [self._merged(part) for part in (used, unused) if part]
            self._num_used = min(self._num_used, 1)

    # Called by autograd and by whoever knows of the optimizer.

    def _on_gradient(self, parameter: Tensor) -> None:
        self._empty_box()
        used = self._waiting[: self._num_used]
        gradient = parameter.grad
        if used and gradient is None:
            self._drop_first()
        elif used and gradient is not None and not any(entry.is_silent for entry in used):
            alive = gradient.detach().any()
            if not may_look_at(alive):
                self._waiting[: self._num_used] = [self._kept_if(alive, entry) for entry in used]
            elif not alive.item():
                self._drop_first()
        self._num_used = len(self._waiting)

    def drop(self) -> None:
        """Forget all that waits."""
        self._empty_box()
        self._num_used = len(self._waiting)
        self._drop_first()

    def _drop_first(self) -> None:
        for entry in self._waiting[: self._num_used]:
            self.num_dropped += entry.num_batches
        del self._waiting[: self._num_used]
        self._num_used = 0

    def settle(self, layer: Normalization, applied: Tensor | None = None) -> None:
        """Move the statistics by the pooled moments of all that waits, as one batch; without gradients.

        Args:
            layer: Whose statistics; a frozen one's stay.
            applied: Boolean, shape (): whether the optimizer applied the gradients, where only a
                device knows.
        """
        self._empty_box()
        mean, var, tracked = *layer._vectors()[2:], layer._buffers.get("num_batches_tracked")
        if layer.frozen or mean is None or var is None or tracked is None:
            self.drop()
        if not self._waiting:
            return
        entries, self._waiting, self._num_used = self._waiting, [], 0
        if applied is not None:
            entries = [self._kept_if(applied, entry) for entry in entries]
        before = _value(tracked)
        entry = entries[0] if len(entries) == 1 else self._merged(entries)
        layer.move(_as(entry.moments, mean.dtype, mean.device))
        moved = _value(tracked) - before
        self.num_moves += moved
        if not entry.is_sound:
            self.num_skipped += 1 - moved

    def _merged(self, entries: list[_Entry]) -> _Entry:
        """Exactly the moments of all samples, but for the batches that are not finite."""
        device = entries[0].moments.mean.device
        entries = [self._sound(entry) for entry in entries]
        # In float64, that rounding does not grow with the number of batches.
        moments = Moments.merged(_as(entry.moments, torch.float64, device) for entry in entries)
        num_batches = sum((entry.num_batches for entry in entries), 0)
        is_silent = any(entry.is_silent for entry in entries)
        return _Entry(moments, num_batches, is_sound=True, is_silent=is_silent)

    def _sound(self, entry: _Entry) -> _Entry:
        """The entry, or one of no samples and batches if its moments are not finite."""
        if entry.is_sound:
            return entry
        probe = entry.moments.mean.sum() + entry.moments.var.sum()
        looks = may_look_at(probe)
        if looks and math.isfinite(probe.item()):
            return replace(entry, is_sound=True)
        sound = probe.isfinite()
        unsound = 1 if looks else (~sound).long()
        self.num_skipped = self.num_skipped + unsound
        moments = _only_if(sound, entry.moments)
        return replace(entry, moments=moments, num_batches=1 - unsound, is_sound=True)

    def _kept_if(self, kept: Tensor, entry: _Entry) -> _Entry:
        """The entry, or, where ``kept`` is false on its device, one of no samples and batches."""
        kept = kept.to(entry.moments.mean.device)
        entry = self._sound(entry)
        self.num_dropped = self.num_dropped + ~kept * entry.num_batches
        moments = replace(entry.moments, count=kept * entry.moments.count)
        return replace(entry, moments=moments, num_batches=kept * entry.num_batches, is_sound=True)

    def _empty_box(self) -> None:
        if self._box.is_in_use:
            moments, num_batches, num_skipped = self._box.take_out()
            self.num_batches = self.num_batches + num_batches
            self.num_skipped = self.num_skipped + num_skipped
            self._append(_Entry(moments, num_batches - num_skipped, is_sound=True))


class _Mailbox:
    """Moments left by compiled code, which can write into tensors only.

    Args:
        nothing: Moments of no samples, in the dtype of the running statistics.
    """

    def __init__(self, nothing: Moments) -> None:
        self.is_in_use = False
        device = nothing.mean.device
        count, self.num_batches, self.num_skipped = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        self.moments = replace(nothing, count=count)

    def put(self, moments: Moments) -> None:
        """Merge one batch in, unless it is not finite."""
        self.is_in_use = True
        mine = self.moments
        sound = (moments.mean.sum() + moments.var.sum()).isfinite()
        whole = mine.merge(_only_if(sound, moments).to(mine.mean.dtype))
        for there, new in zip(mine.statistics, whole.statistics, strict=True):
            there.copy_(new)
        mine.count.copy_(whole.count)
        self.num_batches.add_(1)
        self.num_skipped.add_(~sound)

    def take_out(self) -> tuple[Moments, Tensor, Tensor]:
        """What lies in it, the number of batches and of those left out; it is empty afterwards."""
        mine = (*self.moments.statistics, self.moments.count, self.num_batches, self.num_skipped)
        taken = replace(self.moments.map(torch.clone), count=self.moments.count.clone())
        num_batches, num_skipped = self.num_batches.clone(), self.num_skipped.clone()
        for tensor in mine:
            tensor.zero_()
        return taken, num_batches, num_skipped


def _only_if(sound: Tensor, moments: Moments) -> Moments:
    """The moments, or those of no samples."""
    return replace(moments.map(lambda t: torch.where(sound, t, 0)), count=sound * moments.count)


def _as(moments: Moments, dtype: torch.dtype, device: torch.device) -> Moments:
    if moments.mean.dtype is dtype and moments.mean.device == device:
        return moments
    count = moments.count.to(device) if isinstance(moments.count, Tensor) else moments.count
    return replace(moments.map(lambda t: t.to(device, dtype)), count=count)


def _value(counter: Tensor) -> Any:
    """A counter's value now."""
    return counter.item() if may_look_at(counter) else counter.clone()


def may_look_at(tensor: Tensor) -> bool:
    """Whether reading a value of it costs no waiting for a device."""
    return tensor.is_cpu
