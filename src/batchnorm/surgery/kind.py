"""What a kind of normalization is to `convert`, and what keeps a layer from becoming any."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNormPerActivation
from batchnorm.layers.adopt import OURS
from batchnorm.layers.kinds import is_known
from batchnorm.surgery.frozen_class import frozen_obstacle, is_frozen_by_class

_BY_DIMS: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_EXACT = (*OURS, *OURS.values(), BatchNormPerActivation, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Calls:
    """How the example calls a layer.

    Attributes:
        dims: Numbers of dimensions of its inputs; empty without an example, or if nothing reaches it.
        has_extras: Whether it is given more than its input: a residual, a mask or an activation.
    """

    dims: frozenset[int] = frozenset()
    has_extras: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of normalization layer, with its options.

    Attributes:
        is_one: Whether a layer is of the kind already.
        obstacle: Why a layer cannot become one; empty if it can.
        become: Makes a layer one, in place: every reference, hook and flag stays. Gives what
            happened.
        carries_activations: Whether such layers can; where not, `convert` splits them off before.
    """

    is_one: Callable[[nn.Module], bool]
    obstacle: Callable[[nn.Module, Calls], str]
    become: Callable[[nn.Module, Calls], str]
    carries_activations: bool


def is_normalization(module: nn.Module) -> bool:
    """Whether a module is a batch normalization of any kind, torchvision's frozen one included."""
    return isinstance(module, _BatchNorm) or is_frozen_by_class(module)


def general_obstacle(layer: nn.Module, calls: Calls) -> str:
    """What forbids any conversion; empty if nothing does."""
    if "forward" in vars(layer):
        return "it has a forward of its own, set on the object, which would be lost"
    if is_frozen_by_class(layer):
        return frozen_obstacle(layer)
    if type(layer) is nn.SyncBatchNorm:
        return _dimension_obstacle(calls)
    if _is_exact(type(layer)):
        return ""
    base = next((cls.__name__ for cls in type(layer).__mro__ if _is_exact(cls)), "batch normalization")
    return (
        f"{type(layer).__name__} is a subclass of {base}, and what it does beside (an activation, another "
        f"forward) would be lost; replace it by hand, by a layer with activation=… for example"
    )


def _is_exact(cls: type) -> bool:
    return cls in _EXACT or is_known(cls)


def _dimension_obstacle(calls: Calls) -> str:
    if not calls.dims:
        return (
            "a SyncBatchNorm takes inputs of any dimension, and which it gets here is not known: "
            "give an example that reaches it"
        )
    if not calls.dims <= set(_BY_DIMS) or len({_BY_DIMS[d] for d in calls.dims}) > 1:
        found = " and ".join(map(str, sorted(calls.dims)))
        return f"it is called with inputs of {found} dimensions, which no one layer takes"
    return ""


def desynchronize(layer: nn.Module, calls: Calls) -> str:
    """Make a ``SyncBatchNorm`` the layer of torch.nn that takes its inputs, in place; gives the remark."""
    layer.__dict__.pop("process_group", None)
    layer.__class__ = _BY_DIMS[min(calls.dims)]
    return "; every rank uses its own batch"
