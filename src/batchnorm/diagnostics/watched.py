"""Which tensor of a module is watched, and where its units are."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNormPerActivation, Normalization

_FEATURES_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.MultiheadAttention)


def given_to(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Tensor | None] | None:
    """A module's input and, of our layers, the mask; ``None`` where its forward cannot be called so."""
    ours = isinstance(module, Normalization)
    if args and not kwargs and not (ours and len(args) > 1):
        return args[0], None  # binding takes longer than a small layer
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return None  # its forward is about to say so itself
    return next(iter(given.values()), None), given.get("mask") if ours else None


def check(x: Any, name: str, on: str) -> Tensor:
    """The tensor to watch in what module ``name`` was given or gave: itself, or the first of a tuple.

    Raises:
        TypeError: There is none, or its values are no floating-point numbers.
        ValueError: It has no values, being on the meta device.
    """
    if isinstance(x, tuple | list) and x:
        x = x[0]
    if not isinstance(x, Tensor) or not x.is_floating_point():
        if isinstance(x, Tensor):
            came = f"a tensor of {x.dtype}"
        elif isinstance(x, Mapping):
            came = f"a {type(x).__name__} of {', '.join(map(repr, x))}"
        else:
            came = type(x).__name__
        raise TypeError(
            f"module {name!r} has {came} as its {on}, and only floating-point tensors (or a tuple that "
            "starts with one) can be watched: leave it out of layers=, or name modules inside it"
        )
    if x.is_meta:
        raise ValueError(
            f"module {name!r} has a tensor without values (meta device) as its {on}: give the model memory "
            "and weights first, with to_empty() and load_state_dict()"
        )
    return x


def with_units(
    module: nn.Module, x: Tensor, mask: Tensor | None, channel_dim: int | None
) -> tuple[Tensor, Tensor | None, int]:
    """``x`` detached and with at least two dimensions, its mask, and which dimension holds the units.

    Args:
        module: Whose input or output it is.
        x: Any shape.
        mask: Shape of ``x`` without its units, or ``None``.
        channel_dim: 1 or -1, or ``None`` for what is usual for such a module.
    """
    x = x.detach()
    if isinstance(module, BatchNormPerActivation) and channel_dim is None:
        return x.flatten(1), None if mask is None else mask.flatten(), 1
    if channel_dim is None:
        channel_dim = -1 if isinstance(module, _FEATURES_LAST) else getattr(module, "channel_dim", 1)
    return x if x.dim() >= 2 else x.reshape(-1, 1), mask, channel_dim


def uses_batch(module: nn.Module) -> bool:
    """Whether the module gives what it normalized by the moments of this very batch, and no more."""
    if not isinstance(module, _BatchNorm) or getattr(module, "activation", None) is not None:
        return False
    frozen = getattr(module, "frozen", False)
    return module.running_mean is None or (module.training and not frozen)
