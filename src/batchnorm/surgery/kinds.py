"""The kinds of normalization that `convert` knows: which layers can become one, and how."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm2d, BatchNormPerActivation, Normalization, Synced, adopt
from batchnorm.layers.adopt import OURS, is_borrowed, unadopt
from batchnorm.layers.synced import SYNCED
from batchnorm.surgery.synchronize import become_alone, become_synced, is_synced

_THEIRS = {ours: theirs for theirs, ours in OURS.items()}
_BY_DIMS: dict[int, type[_BatchNorm]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


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
    """A kind of normalization layer.

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


def is_frozen_by_class(module: nn.Module) -> bool:
    """Whether a module is a ``FrozenBatchNorm2d`` as torchvision and others write it: buffers only."""
    buffers = set(module._buffers) - {"num_batches_tracked"}
    return (
        type(module).__name__ == "FrozenBatchNorm2d"
        and buffers == {"weight", "bias", "running_mean", "running_var"}
        and not module._parameters
        and not module._modules
        and isinstance(getattr(module, "eps", None), int | float)
    )


def _foreign(layer: nn.Module) -> str:
    """What forbids any conversion."""
    if "forward" in vars(layer):
        return "it has a forward of its own, set on the object, which would be lost"
    if is_frozen_by_class(layer):
        return _frozen_obstacle(layer)
    known = (*OURS, *_THEIRS, BatchNormPerActivation, *SYNCED.values(), nn.SyncBatchNorm)
    if type(layer) in known:
        return ""
    base = next((cls.__name__ for cls in type(layer).__mro__ if cls in known), "batch normalization")
    return (
        f"{type(layer).__name__} is a subclass of {base}, and what it does beside (an activation, another "
        f"forward) would be lost; replace it by hand, by a layer with activation=… for example"
    )


def _dimension_obstacle(layer: nn.Module, calls: Calls) -> str:
    if type(layer) is not nn.SyncBatchNorm:
        return ""
    if not calls.dims:
        return (
            "a SyncBatchNorm takes inputs of any dimension, and which it gets here is not known: "
            "give an example that reaches it"
        )
    if not calls.dims <= set(_BY_DIMS) or len({_BY_DIMS[d] for d in calls.dims}) > 1:
        found = " and ".join(map(str, sorted(calls.dims)))
        return f"it is called with inputs of {found} dimensions, which no one layer takes"
    return ""


def _desynchronize(layer: nn.Module, calls: Calls) -> None:
    layer.__dict__.pop("process_group", None)
    layer.__class__ = _BY_DIMS[min(calls.dims)]


# Plain: our layers.


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, Normalization) and not is_borrowed(layer) and not isinstance(layer, Synced)


def _plain_obstacle(layer: nn.Module, calls: Calls) -> str:
    return _foreign(layer) or _dimension_obstacle(layer, calls)


def _become_plain(layer: nn.Module, calls: Calls) -> str:
    if is_frozen_by_class(layer):
        _unfreeze_class(layer)
        return "now batchnorm.BatchNorm2d, frozen; γ and β are parameters that do not learn"
    remark = ""
    if type(layer) is nn.SyncBatchNorm:
        _desynchronize(layer, calls)
        remark = "; every rank uses its own batch"
    elif isinstance(layer, Synced):
        remark = become_alone(layer)
    elif isinstance(layer, Normalization):
        remark = "; stays so when it is thawed or its handle removed"
    return f"now batchnorm.{type(adopt(layer)).__name__}{remark}"


def _frozen_obstacle(layer: nn.Module) -> str:
    twin = copy.deepcopy(layer)
    _unfreeze_class(twin)
    mean = layer.running_mean
    if mean.device.type == "meta":
        return ""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, mean.numel(), 3, 3, generator=generator).to(mean.device, mean.dtype)
    hookless = copy.deepcopy(layer)
    for module in (twin, hookless):
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    with torch.no_grad():
        expected, got = hookless(x), twin(x)
    rounding = 100 * torch.finfo(mean.dtype).eps
    if torch.allclose(got, expected, rtol=rounding, atol=rounding * float(expected.abs().max())):
        return ""
    return "it computes something else than its weight, bias and statistics say"


def _unfreeze_class(layer: Any) -> None:
    """A frozen batch normalization by class becomes one by flag, in place."""
    mean = layer.running_mean
    for name in ("weight", "bias"):
        tensor = layer._buffers.pop(name)
        layer._non_persistent_buffers_set.discard(name)
        layer._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    layer._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.long, device=mean.device)
    layer.__class__ = BatchNorm2d
    layer.num_features, layer.momentum = mean.numel(), 0.1
    layer.affine = layer.track_running_stats = True
    layer._become(activation=None, channel_dim=1)
    layer.frozen = True


# Torch: `torch.nn`'s layers.


def _is_torchs(layer: nn.Module) -> bool:
    return type(layer) in OURS


def _torch_obstacle(layer: nn.Module, calls: Calls) -> str:
    if is_frozen_by_class(layer):
        return "torch.nn has no layer that stays frozen in training; to='plain' has"
    reason = _foreign(layer) or _dimension_obstacle(layer, calls)
    if reason or not isinstance(layer, Normalization):
        return reason
    if isinstance(layer, BatchNormPerActivation):
        return "torch.nn has no layer with γ, β and statistics for every activation"
    if layer.frozen:
        return "it is frozen, which torch.nn's layers cannot be in training; thaw it first"
    if layer.channel_dim != 1:
        return "its features sit last (channel_dim=-1), and torch.nn's layers have them in dimension 1 only"
    if calls.has_extras:
        return "it is called with a residual, a mask or an activation, which torch.nn's layers do not take"
    return ""


def _become_torch(layer: nn.Module, calls: Calls) -> str:
    remark = ""
    if type(layer) is nn.SyncBatchNorm:
        _desynchronize(layer, calls)
        remark = "; every rank uses its own batch"
    elif isinstance(layer, Normalization):
        remark = become_alone(layer)
        was = None if layer.running_mean is None else layer.running_mean.dtype
        unadopt(layer)
        now = None if layer.running_mean is None else layer.running_mean.dtype
        if was != now:
            remark += (
                f"; statistics rounded to {str(now).removeprefix('torch.')}, as torch's kernels need them"
            )
    return f"now torch.nn.{type(layer).__name__}{remark}"


# Synced: our layers, by the batch of all ranks.


def _synced_in(group_name: str) -> Kind:
    def become(layer: nn.Module, calls: Calls) -> str:
        own_group = getattr(layer, "process_group", None)
        if not isinstance(layer, Synced) and not _is_plain(layer):
            _become_plain(layer, calls)
        assert isinstance(layer, Normalization)
        return become_synced(layer, group_name, own_group)

    return Kind(lambda layer: is_synced(layer, group_name), _plain_obstacle, become, carries_activations=True)


KINDS: Mapping[str, Kind] = {
    "plain": Kind(_is_plain, _plain_obstacle, _become_plain, carries_activations=True),
    "torch": Kind(_is_torchs, _torch_obstacle, _become_torch, carries_activations=False),
}
"""By the name that ``to=`` takes; "synced" depends on the group beside."""


def kind_named(name: str, group_name: str) -> Kind:
    """The kind of a name.

    Args:
        name: What ``to=`` was given.
        group_name: Of the ranks that share a batch, for "synced".

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    if name == "synced":
        return _synced_in(group_name)
    if name not in KINDS:
        known = ", ".join(map(repr, [*KINDS, "synced"]))
        raise ValueError(f"to={name!r} is no kind of normalization; there are {known}")
    return KINDS[name]
