"""The kinds of normalization that are a plain layer of ours with something else: one short entry for each."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn

from batchnorm import distributed
from batchnorm.layers import Accumulated, EvalNorm, Ghost, Normalization, Renorm, Synced, Whitened
from batchnorm.layers.evalnorm import weight_of
from batchnorm.layers.kinds import become, can_become
from batchnorm.layers.renorm import D_MAX, R_MAX, Limit
from batchnorm.layers.variation import Variation
from batchnorm.surgery.kind import Calls, Kind, general_obstacle
from batchnorm.surgery.kind_plain import make_plain


def ghost(*, ghost_size: int) -> Kind:
    """Our layers, each virtual batch by its own moments; ``ghost_size`` examples are one."""
    return _variation(Ghost, ghost_size=ghost_size)


def accumulated(*, micro_batches: int) -> Kind:
    """Our layers, each micro-batch by the moments of ``micro_batches``: itself and those before it."""
    return _variation(Accumulated, micro_batches=micro_batches)


def evalnorm(*, batch_size: int | None = None, example_weight: float | None = None) -> Kind:
    """Our layers, with the weight that an example had among ``batch_size``, or another."""
    return _variation(EvalNorm, example_weight=weight_of(batch_size, example_weight))


def whitened(*, group_channels: int = 16, iterations: int = 5) -> Kind:
    """Our layers, whitening groups of channels."""
    return _variation(Whitened, group_channels=group_channels, iterations=iterations)


def renorm(*, r_max: Limit = R_MAX, d_max: Limit = D_MAX) -> Kind:
    """Our layers, corrected towards the running statistics; limits are numbers or functions of the step."""

    def obstacle(layer: nn.Module, calls: Calls) -> str:
        if layer.running_mean is None:
            return "it keeps no running statistics (track_running_stats=False) to correct a batch towards"
        return ""

    return _variation(Renorm, obstacle, r_max=r_max, d_max=d_max)


def synced(*, group: dist.ProcessGroup | None = None, group_size: int | None = None) -> Kind:
    """Our layers, by the batch of all ranks of ``group``, or of ``group_size`` consecutive ones."""
    name = distributed.name_of(group, group_size)

    def change(layer: nn.Module, calls: Calls) -> str:
        chosen, own_group = name, getattr(layer, "process_group", None)
        remark = layer.ended if isinstance(layer, Variation) and not isinstance(layer, Synced) else ""
        make_plain(layer, calls)
        # The group that a SyncBatchNorm brings, where none was asked for.
        if name == distributed.WORLD and own_group is not None:
            chosen = distributed.name_of(own_group, None)
        num = distributed.num_ranks(chosen)
        layer = become(layer, Synced, group_name=chosen, place="")
        over = f"over {num} ranks" if num > 1 else "over the ranks that there will be: here is one"
        return f"now batchnorm.{type(layer).__name__}, {over}{remark}"

    def is_one(layer: nn.Module) -> bool:
        return isinstance(layer, Synced) and layer.group_name == name

    return Kind(is_one, general_obstacle, change, carries_activations=True)


def _variation(
    kind: type[Variation], obstacle: Callable[[nn.Module, Calls], str] = lambda *_: "", **settings: Any
) -> Kind:
    """A kind of layers whose options are their settings.

    Args:
        kind: The mixin.
        obstacle: Why a layer cannot be one, beside what forbids any conversion; empty if it can.
        settings: All that it has.

    Raises:
        ValueError: The settings make no sense.
    """
    kind.check_settings(**settings)

    def is_one(layer: nn.Module) -> bool:
        return isinstance(layer, kind) and all(getattr(layer, n) == value for n, value in settings.items())

    def change(layer: Any, calls: Calls) -> str:
        was_one = isinstance(layer, kind)
        remark = make_plain(layer, calls)
        now = become(layer, kind, **settings)
        return f"now batchnorm.{type(now).__name__}, {now.described}{'' if was_one else remark}"

    def any_obstacle(layer: nn.Module, calls: Calls) -> str:
        if isinstance(layer, Normalization) and not can_become(layer, kind):
            return f"single activations are not of this kind: there is no such {type(layer).__name__}"
        return general_obstacle(layer, calls) or obstacle(layer, calls)

    return Kind(is_one, any_obstacle, change, carries_activations=True)


def name_places(model: nn.Module) -> None:
    """Tell synchronized layers their paths, by which the watchdog calls them."""
    for path, layer in model.named_modules():
        if isinstance(layer, Synced):
            layer.place = path
