"""Which tensor of a module is watched, and where its units are."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from batchnorm.layers import BatchNormPerActivation, Normalization
from batchnorm.layers.variation import Variation

_FEATURES_LAST = (
    nn.Linear,
    nn.Bilinear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


@dataclass(frozen=True)
class Given:
    """What a module was called with.

    Attributes:
        x: The first argument.
        mask: Of our layers, else ``None``.
        has_more: Whether one of our layers is to add a residual or to apply an activation in this call.
    """

    x: Any
    mask: Tensor | None = None
    has_more: bool = False


def given_to(module: nn.Module, args: Any, kwargs: Any) -> Given | None:
    """What a module was called with; ``None`` where its forward cannot be called so."""
    ours = isinstance(module, Normalization)
    if args and not kwargs and not (ours and len(args) > 1):
        return Given(args[0])  # binding takes longer than a small layer
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return None  # its forward is about to say so itself
    x = next(iter(given.values()), None)
    if not ours:
        return Given(x)
    has_more = given.get("residual") is not None or given.get("activation") is not None
    return Given(x, given.get("mask"), has_more)


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
    name: str, module: nn.Module, x: Tensor, mask: Tensor | None, channel_dim: int | None
) -> tuple[Tensor, Tensor | None, int]:
    """``x`` detached and with at least two dimensions, its mask, and which dimension holds the units.

    Args:
        name: The module's path, for the error.
        module: Whose input or output it is.
        x: Any shape.
        mask: As the module was given it, or ``None``.
        channel_dim: 1 or -1, or ``None`` for what is usual for such a module.

    Raises:
        ValueError: There is a mask, and ``channel_dim`` is not where the module has its channels.
    """
    x = x.detach()
    per_activation = isinstance(module, BatchNormPerActivation)
    usual = -1 if isinstance(module, _FEATURES_LAST) else getattr(module, "channel_dim", 1)
    if channel_dim is None and per_activation:
        return x.flatten(1), None if mask is None else mask.flatten(), 1
    if mask is not None and channel_dim is not None and (per_activation or channel_dim != usual):
        raise ValueError(
            f"module {name!r} is called with a mask, whose shape is that of its input without its channels, "
            f"and channel_dim={channel_dim} takes other units than these: leave out channel_dim=, or the "
            "module"
        )
    return x if x.dim() >= 2 else x.reshape(-1, 1), mask, usual if channel_dim is None else channel_dim


def gives_standardized(module: nn.Module, given: Given) -> bool:
    """Whether the module gives what it normalized by the moments of this very batch, and no more."""
    if isinstance(module, Normalization):
        differs = isinstance(module, Variation) and "training" in module.differs
        plain = module.activation is None and not given.has_more and not differs
        trains = module.training and not module.frozen
    else:
        # What else a subclass does is not known; SyncBatchNorm normalizes by the moments of all ranks.
        plain = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        trains = module.training
    return plain and (trains or module.running_mean is None)
