"""Running statistics that move with the optimizer: once a step, by everything the step learned from."""

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from batchnorm.layers import Normalization
from batchnorm.layers.adopt import OURS, borrow, release
from batchnorm.layers.pending import Pending, may_look_at

_NAME = "commit_on_step"


def commit_on_step(model: nn.Module, optimizer: Optimizer | Iterable[Optimizer]) -> "CommitHandle":
    """Let running statistics move when the optimizer steps, instead of in every forward.

    Moments of training batches follow the gradients of these batches:

    - As long as gradients accumulate, so do the moments, merged by their counts. When the optimizer
      applies the gradients, the statistics move once, as by one batch of all the samples.
    - When the gradients are dropped, so are the moments: by a `torch.amp.GradScaler` that finds an
      overflow, by ``zero_grad`` after a backward pass. Of the calls that an optimizer makes of a
      closure, as LBFGS does, the last one counts: the others' gradients are cleared.
    - A batch that is not finite at a layer is left out there, and counted.
    - A forward without a backward, as under `torch.no_grad`, counts with the next step.
    - A forward repeated by activation checkpointing does not count.

    Layers of `torch.nn` become ours in place, until `CommitHandle.remove`: same objects, parameters
    and state dict. Frozen layers stay as they are for as long as they are frozen. In a distributed
    job every rank pools its own batches. No device is waited for.

    Args:
        model: Where it is going to be trained: on its device, before or after `torch.compile` and
            wrappers for data parallelism.
        optimizer: That trains it, or several; whichever steps first after a backward pass
            commits. Each has to hold a parameter of the model.

    Returns:
        The handle, which undoes it all; also a context manager.

    Raises:
        TypeError: ``model`` is not a module, or ``optimizer`` no optimizer.
        ValueError: No batch normalization that can be committed, with the reason for each; lazy,
            scripted or on the meta device; a layer has a handle already; or an optimizer without
            any parameter of the model.

    Source: Ioffe & Szegedy (2015), section 3.1, for the statistics of a mini-batch; Chan, Golub &
    LeVeque (1983) for their merging.
    """
    _check_model(model)
    optimizers = _as_optimizers(optimizer)
    model = _unwrapped(model)
    layers, refusals = _choose(model)
    learned = _learned(model, optimizers)
    return CommitHandle(layers, refusals, optimizers, _watched(layers, learned))


class CommitHandle:
    """What `commit_on_step` did; ``print`` shows what happened layer by layer.

    Attributes:
        layers: The layers whose statistics wait for the optimizer, by path.
        refusals: Batch normalizations that were left alone, with the reason; torch's own move
            in every forward, as ever.
    """

    def __init__(
        self,
        layers: dict[str, _BatchNorm],
        refusals: dict[str, str],
        optimizers: list[Optimizer],
        watched: dict[str, nn.Parameter | None],
    ) -> None:
        self.layers: dict[str, Normalization] = {}
        self.refusals = refusals
        self._pending: dict[str, Pending] = {}
        for path, layer in layers.items():
            ours = self.layers[path] = borrow(layer, _NAME)
            pending = ours.pending = self._pending[path] = Pending(ours)
            pending.watch(watched[path])
        self._hooks = [o.register_step_post_hook(self._on_step) for o in optimizers]

    @property
    def moves(self) -> dict[str, int]:
        """How often the statistics of each layer moved."""
        return self._counts("num_moves")

    @property
    def batches(self) -> dict[str, int]:
        """Training batches that each layer saw."""
        return self._counts("num_batches")

    @property
    def skipped(self) -> dict[str, int]:
        """Batches that each layer left out: not finite, or all but fewer than two samples masked."""
        return self._counts("num_skipped")

    @property
    def dropped(self) -> dict[str, int]:
        """Batches of each layer whose gradients were dropped."""
        return self._counts("num_dropped")

    @property
    def waiting(self) -> dict[str, int]:
        """Batches of each layer that wait for a step."""
        return self._counts("num_waiting")

    def commit(self) -> None:
        """Move the statistics by what waits, now: for an update that is no `torch.optim.Optimizer`'s."""
        self._settle(None)

    def drop(self) -> None:
        """Forget what waits, of a batch that is given up before its backward pass, say."""
        for pending in self._pending.values():
            pending.drop()

    def remove(self) -> None:
        """Undo it: layers are exactly what they were, with the statistics they have now.

        What waits is dropped; `commit` it before, if it should count. The counts can still be read.
        """
        self.drop()
        for hook in self._hooks:
            hook.remove()
        for path, layer in self.layers.items():
            if layer.__dict__.get("pending") is self._pending[path]:
                self._pending[path].watch(None)
                del layer.pending
                release(layer, _NAME)

    def __enter__(self) -> "CommitHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is called by the scaler in any case, and told of an overflow in a tensor.
        found = getattr(optimizer, "found_inf", None)
        applied = None if found is None else (found == 0).all()
        if applied is not None and may_look_at(applied):
            if not applied.item():
                return self.drop()
            applied = None
        self._settle(applied)

    @torch.no_grad()
    def _settle(self, applied: Tensor | None) -> None:
        for path, pending in self._pending.items():
            pending.settle(self.layers[path], applied)

    def _counts(self, what: str) -> dict[str, int]:
        return {path: int(getattr(pending, what)) for path, pending in self._pending.items()}

    def __str__(self) -> str:
        columns = (self.moves, self.batches, self.skipped, self.dropped, self.waiting)
        head = ("layer", "moves", "batches", "not finite", "dropped", "waiting")
        rows: list[tuple[str, ...]] = [head]
        rows += [(path or "(model)", *(str(column[path]) for column in columns)) for path in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([*lines, *(f"left alone: {path!r}: {why}" for path, why in self.refusals.items())])


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"commit_on_step needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, ScriptModule):
        raise ValueError("commit_on_step needs the Python model, got a scripted one: do it before torch.jit")


def _unwrapped(model: Any) -> nn.Module:
    wrappers = nn.DataParallel | nn.parallel.DistributedDataParallel
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    return model


def _as_optimizers(given: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    optimizers = [given] if isinstance(given, Optimizer) or not isinstance(given, Iterable) else list(given)
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"commit_on_step needs a torch.optim.Optimizer or several, got {type(optimizer).__name__}; "
                f"with another kind of update, give an optimizer of the same parameters that never steps, "
                f"and call handle.commit() after each update"
            )
    if not optimizers:
        raise ValueError("commit_on_step needs at least one optimizer, got an empty sequence")
    return optimizers


def _choose(model: nn.Module) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """The layers to be committed, and why each other batch normalization is not one of them."""
    layers: dict[str, _BatchNorm] = {}
    refusals: dict[str, str] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            reason = _obstacle(path, layer)
            if reason:
                refusals[path] = reason
            else:
                layers[path] = layer
    if not layers:
        found = "; ".join(f"{path or '(model)'}: {why}" for path, why in refusals.items())
        raise ValueError(
            f"{type(model).__name__} has no batch normalization whose statistics could wait for the "
            f"optimizer{': ' + found if found else ''}"
        )
    return layers, refusals


def _obstacle(path: str, layer: _BatchNorm) -> str:
    """Why a layer is left alone; empty if it is not.

    Raises:
        ValueError: It is not ready, or has a handle.
    """
    place = f"layer {path or '(model)'!r}"
    if any(is_lazy(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
        raise ValueError(f"{place} is still lazy: run one batch through the model before commit_on_step")
    if not isinstance(layer, Normalization) and type(layer) not in OURS:
        return f"{type(layer).__name__} is neither torch's BatchNorm1d, 2d or 3d itself nor ours"
    if layer.running_mean is None or not layer.track_running_stats:
        return "it keeps no running statistics"
    if layer.running_mean.device.type == "meta":
        raise ValueError(
            f"{place} is on the meta device: give the model values (to_empty, load_state_dict) first"
        )
    if getattr(layer, "pending", None) is not None:
        raise ValueError(
            f"{place} waits for an optimizer already: remove that handle first, or give all optimizers to "
            f"one call of commit_on_step"
        )
    return ""


def _learned(model: nn.Module, optimizers: list[Optimizer]) -> list[nn.Parameter]:
    """The model's parameters that the optimizers train, in the model's order."""
    mine = list(model.parameters())
    held: set[int] = set()
    for position, optimizer in enumerate(optimizers):
        ids = {id(p) for p in _parameters(optimizer)}
        if not any(id(p) in ids for p in mine):
            name = type(optimizer).__name__ + (f" (number {position})" if len(optimizers) > 1 else "")
            raise ValueError(
                f"{name} holds none of {type(model).__name__}'s parameters, so its steps say nothing of this "
                f"model's batches; give the optimizer that was made from model.parameters(), after any copy"
            )
        held |= ids
    return [p for p in mine if id(p) in held and p.requires_grad]


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _watched(layers: dict[str, _BatchNorm], learned: list[nn.Parameter]) -> dict[str, nn.Parameter | None]:
    """For each layer a parameter whose gradients tell of its batches: its own, or the model's last."""
    ids = {id(p) for p in learned}
    last = learned[-1] if learned else None
    return {
        path: next((p for p in layer.parameters(recurse=False) if id(p) in ids), last)
        for path, layer in layers.items()
    }
