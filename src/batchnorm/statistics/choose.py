"""Which layers' statistics are concerned, and how everything is put back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from batchnorm.layers import Normalization

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers for data parallelism and weight averaging.

    The former would synchronize buffers, or run copies, in every forward. The latter's own training
    flag says nothing about the network's, which was copied with the flags that it had.
    """
    while isinstance(model, _WRAPPERS):
        model = model.module
    return model


def mark_settled(model: nn.Module) -> None:
    """Note on averages of weights that their statistics were measured, and at which update."""
    for module in model.modules():
        if isinstance(module, AveragedModel):
            module.__dict__["_settled_at"] = int(module.n_averaged)


def is_settled(model: AveragedModel) -> bool:
    """Whether an average's statistics were measured since its last update; not known of a loaded one."""
    return bool(model.__dict__.get("_settled_at") == int(model.n_averaged))


def choose(model: nn.Module) -> tuple[dict[str, _BatchNorm], list[str]]:
    """The layers to recalibrate, and a note on each batch normalization that is not one of them.

    Raises:
        ValueError: There are none, or a module has no values yet (lazy, or on the meta device).
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no batch normalization (torch.nn.BatchNorm*, or a subclass): "
            "there are no statistics to recalibrate"
        )
    for name, module in model.named_modules():
        _refuse_without_values(name, module)
    layers, notes = {}, []
    for name, layer in norms.items():
        if layer.running_mean is None or not layer.track_running_stats:
            notes.append(f"{name!r} left alone: it keeps no running statistics and uses each batch's own")
        elif isinstance(layer, Normalization) and layer.frozen:
            notes.append(f"{name!r} left alone: it is frozen")
        elif model.training and not layer.training:
            notes.append(f"{name!r} left alone: in evaluation mode inside a model in training mode (frozen)")
        else:
            layers[name] = layer
    if not layers:
        raise ValueError("no layer to recalibrate: " + "; ".join(notes))
    return layers, notes


def _refuse_without_values(name: str, module: nn.Module) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if is_lazy(tensor):
            raise ValueError(f"layer {name!r} is still lazy: run one batch through the model first")
        if tensor.is_meta:
            raise ValueError(
                f"layer {name!r} is on the meta device and has no values: call "
                'model.to_empty(device="cpu") (or another device) and load its state dict first'
            )


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Everything in evaluation mode inside; flags and statistics as they were outside."""
    # Flags are set one by one: `model.eval()` would run, and be at the mercy of, overridden `train`.
    flags = [(module, module.training) for module in model.modules()]
    saved = saved_statistics(m for m in model.modules() if isinstance(m, _BatchNorm))
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        put_back(saved)
        for module, flag in flags:
            module.training = flag


def saved_statistics(layers: Iterable[_BatchNorm]) -> list[tuple[Tensor, Tensor]]:
    """Every buffer of the layers, with a copy of its values."""
    return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]


def put_back(saved: list[tuple[Tensor, Tensor]]) -> None:
    """Give buffers the values that `saved_statistics` found."""
    with torch.no_grad():
        for buffer, value in saved:
            buffer.copy_(value)


def statistics_of(layer: _BatchNorm) -> tuple[Tensor, ...]:
    """A layer's running mean and variance, and its covariances where it has any, as they are."""
    cov = layer._buffers.get("running_cov")
    return (layer.running_mean, layer.running_var, *(() if cov is None else (cov,)))


def store(layer: _BatchNorm, *statistics: Tensor) -> None:
    """Make these the layer's running statistics.

    Args:
        layer: Of any kind.
        statistics: Mean and variance, shape (C,), and covariances where it has running ones.

    Raises:
        ValueError: It has, and there are none.
    """
    buffers = statistics_of(layer)
    if len(statistics) < len(buffers):
        raise ValueError(
            f"{type(layer).__name__} has running covariances, which a new mean and variance do not fit: "
            "recalibrate it, or bn.convert(model, to='plain') first"
        )
    for buffer, new in zip(buffers, statistics, strict=True):
        buffer.copy_(new.view_as(buffer))
