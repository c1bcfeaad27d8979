"""Outputs of normalizations forgotten between forward and backward, and computed again from their inputs.

A normalization keeps its input for its backward pass, and the layer behind it keeps its input,
which is the normalization's output. One follows from the other, element by element: so only
the first is kept.
"""

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from batchnorm.functional import normalize_with

_MOST_STEPS = 2
"""Outputs that may have to be computed one from the other, as in a chain of residual sums, before
one is kept: backward goes along such a chain against its direction."""

_active = threading.local()
_num_active = 0
_counting = threading.Lock()


def active() -> "Saver | None":
    """The saver at work in this thread."""
    return getattr(_active, "saver", None)


def is_active() -> bool:
    """Whether a saver is at work in any thread."""
    return _num_active > 0


def _count(change: int) -> None:
    global _num_active
    with _counting:
        _num_active += change


class Geometry(NamedTuple):
    """Where in its storage a tensor lies."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Slot:
    """What autograd holds in place of a saved tensor: the tensor, or the recipe for it."""

    __slots__ = ("__weakref__", "geometry", "recipe", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()
        self.version = tensor._version
        is_strided = tensor.layout is torch.strided
        self.geometry = (
            Geometry(tensor.size(), tensor.stride(), tensor.storage_offset()) if is_strided else None
        )
        self.recipe: Recipe | None = None

    def forget(self, recipe: "Recipe") -> None:
        """Hold a recipe instead of the tensor."""
        self.tensor, self.recipe = None, recipe
        recipe.waiting.add(self)

    def value(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: It was overwritten after it was saved.
        """
        if self.recipe is not None:
            return self.recipe.view(self)
        assert self.tensor is not None
        # Autograd makes this check itself only where no hooks replace saved tensors.
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} needed for the gradient was modified by an "
                f"in-place operation: it is at version {self.tensor._version}, saved was {self.version}"
            )
        return self.tensor

    @property
    def num_steps(self) -> int:
        """Outputs that have to be computed to get at the tensor."""
        return 0 if self.recipe is None else self.recipe.num_steps


class Recipe:
    """How an output follows from kept tensors.

    Attributes:
        compute: Gives the output, for the inputs in ``slots``.
        slots: Of the input and of the residual, if there is one.
        vectors: Small tensors that ``compute`` holds, to be counted.
        waiting: Slots that still want the output; it is computed once for all of them.
        num_steps: Outputs to be computed, with this one.
    """

    def __init__(
        self, compute: Callable[..., Tensor], slots: list[Slot], vectors: list[Tensor], like: Tensor
    ) -> None:
        self.compute, self.slots, self.vectors = compute, slots, vectors
        self.like = Geometry(like.size(), like.stride(), like.storage_offset())
        self.waiting: weakref.WeakSet[Slot] = weakref.WeakSet()
        self.num_steps = 1 + max(slot.num_steps for slot in slots)
        self._output: Tensor | None = None

    def view(self, slot: Slot) -> Tensor:
        """The output as a slot saw it: all of it, or a view."""
        output = self._output
        if output is None:
            with torch.no_grad():
                output = self.compute(*(s.value() for s in self.slots))
                if output.stride() != self.like.stride:
                    output = output.new_empty_strided(*self.like[:2]).copy_(output)
        self.waiting.discard(slot)
        self._output = output if self.waiting else None
        if slot.geometry is None or slot.geometry == self.like:
            return output
        size, stride, offset = slot.geometry
        return output.as_strided(size, stride, offset - self.like.offset + output.storage_offset())


class Saver:
    """A context in which autograd forgets the outputs of our layers; what is held can be counted.

    Only outputs that require a gradient and whose input the layer itself has saved: then the
    recipe holds nothing that would not be there anyway.

    Args:
        forget: Whether to forget; without, only to count.
    """

    def __init__(self, *, forget: bool = True) -> None:
        self._forget = forget
        self._slots: dict[int, list[weakref.ref[Slot]]] = {}
        self._outputs: dict[int, tuple[StorageWeakRef, int, Recipe]] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, Slot.value)

    def __enter__(self) -> "Saver":
        _count(1)
        self._outer = active()
        self._hooks.__enter__()
        _active.saver = self
        return self

    def __exit__(self, *error: object) -> None:
        _active.saver = self._outer
        self._hooks.__exit__(*error)
        _count(-1)
        # What no one has saved by now is not going to be wanted.
        self._outputs.clear()

    def _pack(self, tensor: Tensor) -> Slot:
        slot = Slot(tensor)
        if slot.geometry is not None:
            key = tensor.untyped_storage()._cdata
            self._slots.setdefault(key, []).append(weakref.ref(slot))
            known = self._outputs.get(key)
            if known is not None and known[1] == tensor._version:
                slot.forget(known[2])
        return slot

    def offer(
        self,
        output: Tensor,
        compute: Callable[..., Tensor],
        inputs: list[Tensor],
        vectors: list[Tensor],
    ) -> None:
        """Tell of an output and how it was computed.

        Args:
            output: Of a layer.
            compute: Gives it again for ``inputs``; called without gradients.
            inputs: The layer's input, and the residual if there is one.
            vectors: Small tensors that ``compute`` holds.
        """
        storage = output.untyped_storage()
        if not (self._forget and output.requires_grad and self._holds(inputs[0])):
            return
        if storage._cdata == inputs[0].untyped_storage()._cdata:
            return
        slots = [self._pack(tensor) for tensor in inputs]
        recipe = Recipe(compute, slots, vectors, output)
        if recipe.num_steps > _MOST_STEPS:
            return
        # The weak reference keeps the number from being given to another storage.
        self._outputs[storage._cdata] = (StorageWeakRef(storage), output._version, recipe)
        for slot in self._at(output):
            slot.forget(recipe)

    def _at(self, tensor: Tensor) -> list[Slot]:
        """Slots that hold the storage of a tensor in its present version."""
        slots = [reference() for reference in self._slots.get(tensor.untyped_storage()._cdata, [])]
        return [
            slot
            for slot in slots
            if slot is not None and slot.tensor is not None and slot.version == tensor._version
        ]

    def _holds(self, tensor: Tensor) -> bool:
        known = self._outputs.get(tensor.untyped_storage()._cdata)
        return bool(self._at(tensor)) or (known is not None and known[1] == tensor._version)

    def num_bytes(self, apart_from: set[int]) -> int:
        """Bytes that are held for the backward pass, each storage counted once.

        Args:
            apart_from: Addresses of storages that are not counted, such as those of parameters.
        """
        found: dict[int, int] = {}
        waiting = [slot for refs in self._slots.values() for ref in refs if (slot := ref()) is not None]
        seen: set[int] = set()
        while waiting:
            slot = waiting.pop()
            if id(slot) in seen:
                continue
            seen.add(id(slot))
            tensors = [] if slot.tensor is None else [slot.tensor]
            if slot.recipe is not None:
                tensors += slot.recipe.vectors
                waiting += slot.recipe.slots
            for tensor in tensors:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in apart_from:
                    found[storage.data_ptr()] = storage.nbytes()
        return sum(found.values())


def offer(
    output: Tensor, x: Tensor, vectors: list[Tensor | None], *, mask: Tensor | None, **options: Any
) -> None:
    """Tell the saver at work in this thread, if there is one, how a layer's output was computed.

    Args:
        output: Of the layer.
        x: Its input.
        vectors: The mean and the variance it was normalized with, weight and bias.
        mask: Outputs computed with one are kept.
        options: The other keyword arguments of `batchnorm.functional.normalize_with`.
    """
    saver = None if torch.compiler.is_compiling() else active()
    if saver is None or mask is not None:
        return
    residual = options.pop("residual")
    # Copies: an optimizer or a later batch may move the layer's own before this batch's backward.
    held = [None if v is None else v.detach().clone() for v in vectors]

    def compute(x: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalize_with(x, *held, residual=residual, **options)

    inputs = [x] if residual is None else [x, residual]
    saver.offer(output, compute, inputs, [v for v in held if v is not None])


def can_forget() -> bool:
    """Whether a `Saver` can and should work here.

    Not where nothing is saved, where a compiler decides what is kept, where `torch.func` forbids
    hooks, and not inside other hooks on saved tensors, such as those of activation checkpointing
    around the whole model, which want to see the tensors themselves.
    """
    autograd: Any = torch._C._autograd  # not all of it is in torch's own stubs
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and autograd._saved_tensors_hooks_is_enabled()
        and autograd._top_saved_tensors_default_hooks(False) is None
    )
