"""The kind of normalization that `torch.nn` has."""

from torch import nn

from batchnorm.layers import BatchNormPerActivation, Normalization
from batchnorm.layers.adopt import OURS, unadopt
from batchnorm.layers.kinds import become_plain
from batchnorm.layers.variation import Variation
from batchnorm.surgery.frozen_class import is_frozen_by_class
from batchnorm.surgery.kind import Calls, Kind, desynchronize, general_obstacle


def torchs() -> Kind:
    """The layers of `torch.nn`."""
    return Kind(lambda layer: type(layer) in OURS, _obstacle, _become, carries_activations=False)


def _obstacle(layer: nn.Module, calls: Calls) -> str:
    if is_frozen_by_class(layer):
        return "torch.nn has no layer that stays frozen in training; to='plain' has"
    reason = general_obstacle(layer, calls)
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


def _become(layer: nn.Module, calls: Calls) -> str:
    remark = ""
    if type(layer) is nn.SyncBatchNorm:
        remark = desynchronize(layer, calls)
    elif isinstance(layer, Normalization):
        if isinstance(layer, Variation):
            remark = layer.ended
            become_plain(layer)
        was = None if layer.running_mean is None else layer.running_mean.dtype
        unadopt(layer)
        now = None if layer.running_mean is None else layer.running_mean.dtype
        if was != now:
            remark += (
                f"; statistics rounded to {str(now).removeprefix('torch.')}, as torch's kernels need them"
            )
    return f"now torch.nn.{type(layer).__name__}{remark}"
