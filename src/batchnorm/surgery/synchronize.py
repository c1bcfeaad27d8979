"""The synchronized kind of normalization: plain layers of ours that normalize by the batch of all ranks."""

from typing import Any

from torch import nn

from batchnorm import distributed
from batchnorm.layers import Normalization, Synced
from batchnorm.layers.adopt import adopt
from batchnorm.layers.synced import desynchronize, synchronize


def is_synced(layer: nn.Module, group_name: str) -> bool:
    """Whether a layer shares its batch with that group."""
    return isinstance(layer, Synced) and layer.group_name == group_name


def become_synced(layer: Normalization, group_name: str, own_group: Any) -> str:
    """Make a plain layer of ours, or a synchronized one, share its batch with a group.

    Args:
        layer: Changed in place.
        group_name: What `distributed.name_of` gave for what the caller asked for.
        own_group: The process group that a ``SyncBatchNorm`` brought, which it keeps where none was
            asked for.

    Returns:
        What happened.
    """
    if isinstance(layer, Synced):
        desynchronize(layer)
    if group_name == distributed.WORLD and own_group is not None:
        group_name = distributed.name_of(own_group, None)
    num = distributed.num_ranks(group_name)
    synced = synchronize(adopt(layer), group_name, "")
    over = f"over {num} ranks" if num > 1 else "over the ranks that there will be: here is one"
    return f"now batchnorm.{type(synced).__name__}, {over}"


def become_alone(layer: nn.Module) -> str:
    """Undo it, in place, if it is a synchronized layer; gives the remark for the report."""
    if not isinstance(layer, Synced):
        return ""
    desynchronize(layer)
    return "; every rank uses its own batch"


def name_places(model: nn.Module) -> None:
    """Tell synchronized layers their paths, by which the watchdog calls them."""
    for path, layer in model.named_modules():
        if isinstance(layer, Synced):
            layer.place = path
