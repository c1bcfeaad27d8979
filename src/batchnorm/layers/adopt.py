"""Making torch's own layers ours, in place: for good, or on loan."""

import torch
from torch import nn

from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

OURS: dict[type[nn.Module], type[Normalization]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
"""Our class for each of torch's that can be adopted."""

_LOAN = "_on_loan"


def adopt(layer: nn.Module) -> Normalization:
    """Turn a plain `torch.nn` BatchNorm into our layer of the same kind, in place and for good.

    Parameters, buffers, hooks, flags and every reference to the module stay; running
    statistics in half precision are widened to float32.

    Args:
        layer: Exactly a `torch.nn.BatchNorm1d`, `2d` or `3d`, or a layer of ours (returned as is;
            one that is `borrow`\\ ed stays ours from now on).

    Returns:
        ``layer`` itself.

    Raises:
        TypeError: The layer is of another class; its behaviour is not known here.
    """
    if isinstance(layer, Normalization):
        layer.__dict__.pop(_LOAN, None)
        return layer
    ours = OURS.get(type(layer))
    if ours is None:
        raise TypeError(
            f"only torch.nn.BatchNorm1d, 2d and 3d themselves can be adopted, got {type(layer).__name__}; "
            f"replace it by a layer of batchnorm by hand"
        )
    layer.__class__ = ours
    assert isinstance(layer, Normalization)
    layer._become(activation=None, channel_dim=1)
    return layer


def unadopt(layer: Normalization) -> None:
    """Turn our layer back into the `torch.nn` BatchNorm of the same kind, in place; undoes `adopt`.

    Running statistics take the dtype of the parameters, which torch's kernels want them to have.

    Args:
        layer: Exactly our `BatchNorm1d`, `2d` or `3d`, that does nothing which torch's cannot.
    """
    theirs = next(theirs for theirs, ours in OURS.items() if ours is type(layer))
    for name in ("activation", "channel_dim", "frozen", "pending", _LOAN):
        layer.__dict__.pop(name, None)
    # By name: to a type checker, an object of this class cannot leave it.
    object.__setattr__(layer, "__class__", theirs)
    if layer.weight is not None:
        _cast_statistics(layer, dict.fromkeys(("running_mean", "running_var"), layer.weight.dtype))


def borrow(layer: nn.Module, by: str) -> Normalization:
    """`adopt` a layer until everyone who borrowed it has given it back with `release`.

    Args:
        layer: As in `adopt`.
        by: Who borrows.

    Raises:
        TypeError: As `adopt`.
    """
    loan = layer.__dict__.get(_LOAN)
    if loan is None and not isinstance(layer, Normalization):
        was = type(layer), {name: buffer.dtype for name, buffer in layer.named_buffers()}
        adopt(layer)
        loan = layer.__dict__[_LOAN] = (*was, set())
    if loan is not None:
        loan[2].add(by)
    assert isinstance(layer, Normalization)
    return layer


def is_borrowed(layer: nn.Module) -> bool:
    """Whether a layer is torch's, and ours on loan only."""
    return _LOAN in layer.__dict__


def release(layer: Normalization, by: str) -> None:
    """Give a borrowed layer back; the last one to do so makes it torch's again, exactly as it was.

    Args:
        layer: Borrowed, or a layer that was ours from the start, which stays ours.
        by: Who borrowed it.
    """
    if not is_borrowed(layer):
        return
    was, dtypes, holders = layer.__dict__[_LOAN]
    holders.discard(by)
    if not holders:
        unadopt(layer)
        assert type(layer) is was
        _cast_statistics(layer, dtypes)


def _cast_statistics(layer: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    for name, dtype in dtypes.items():
        buffer = layer._buffers.get(name)
        if buffer is not None:
            layer._buffers[name] = buffer.to(dtype)
