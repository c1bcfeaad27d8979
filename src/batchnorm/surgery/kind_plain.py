"""The plain kind of normalization: our layers, each by its own batch."""

from typing import Any

from torch import nn

from batchnorm.layers import Normalization, adopt
from batchnorm.layers.adopt import is_borrowed
from batchnorm.layers.kinds import become_plain
from batchnorm.layers.variation import Variation
from batchnorm.surgery.frozen_class import is_frozen_by_class, unfreeze_class
from batchnorm.surgery.kind import Calls, Kind, desynchronize, general_obstacle


def plain() -> Kind:
    """The layers of this package."""
    return Kind(_is_plain, general_obstacle, _become, carries_activations=True)


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, Normalization) and not is_borrowed(layer) and not isinstance(layer, Variation)


def _become(layer: nn.Module, calls: Calls) -> str:
    if is_frozen_by_class(layer):
        make_plain(layer, calls)
        return "now batchnorm.BatchNorm2d, frozen; γ and β are parameters that do not learn"
    remark = make_plain(layer, calls)
    return f"now batchnorm.{type(layer).__name__}{remark}"


def make_plain(layer: Any, calls: Calls) -> str:
    """Make any layer without an obstacle a plain one of ours, in place.

    Returns:
        What ended by that, for the report.
    """
    if is_frozen_by_class(layer):
        unfreeze_class(layer)
        return ""
    remark = ""
    if type(layer) is nn.SyncBatchNorm:
        remark = desynchronize(layer, calls)
    elif isinstance(layer, Variation):
        remark = layer.ended
        become_plain(layer)
    elif is_borrowed(layer):
        remark = "; stays so when it is thawed or its handle removed"
    adopt(layer)
    return remark
