"""Group normalization in the place of batch normalization: no statistics of the batch at all."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Joined, Normalization
from batchnorm.layers.variation import Variation
from batchnorm.surgery.models import copied

_OURS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
_THEIRS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class GroupNormalized(nn.Sequential):
    """A group normalization and the activation that the layer in its place carried."""


LEAST_CHANNELS, LEAST_FEATURES = 2, 16
"""In a group, of layers with spatial dimensions and of `BatchNorm1d`: two numbers by themselves, normalized,
are 1 and −1 whatever they were."""


def num_groups(layer: _BatchNorm, most: int) -> int:
    """The largest divisor of the channels that is at most ``most`` and leaves groups large enough."""
    channels = layer.num_features
    least = LEAST_FEATURES if isinstance(layer, nn.BatchNorm1d) else LEAST_CHANNELS
    return max(g for g in range(1, min(most, max(1, channels // least)) + 1) if channels % g == 0)


def with_group_norm(model: nn.Module, most: int) -> tuple[nn.Module, int, list[str]]:
    """A copy of a model with `torch.nn.GroupNorm` where it has batch normalization.

    γ and β go on; running statistics have no part in it.

    Args:
        model: Not changed.
        most: Groups at most; see `num_groups`.

    Returns:
        The copy, how many layers were replaced, and for each that was not why.

    Raises:
        ValueError: The model cannot be copied.
    """
    new = copied(model)
    made: dict[int, nn.Module] = {}
    left = []
    for path, layer in new.named_modules():
        if isinstance(layer, _BatchNorm):
            if reason := _obstacle(layer):
                left.append(f"{path}: {reason}")
            else:
                made[id(layer)] = _group_norm(layer, most)
    for parent in list(new.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    return made.get(id(new), new), len(made), left


def _obstacle(layer: _BatchNorm) -> str:
    is_known = type(layer) in (*_OURS, *_THEIRS) or (
        isinstance(layer, Variation) and isinstance(layer, _OURS)
    )
    if not is_known:
        return f"what {type(layer).__name__} does beside would be lost"
    if isinstance(layer, Normalization) and layer.channel_dim != 1:
        return "its features sit last, and torch.nn.GroupNorm has them in dimension 1"
    if isinstance(layer, Normalization) and layer.frozen:
        return "it is frozen"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        return "it has hooks"
    return ""


def _group_norm(layer: _BatchNorm, most: int) -> nn.Module:
    groups = num_groups(layer, most)
    weight = layer.weight
    like = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}
    norm = nn.GroupNorm(groups, layer.num_features, layer.eps, affine=weight is not None, **like)
    if weight is not None:
        # The same parameter objects: whether they learn, and who shares them, stays.
        norm.weight, norm.bias = layer.weight, layer.bias
    norm.training = layer.training
    activation = layer.activation if isinstance(layer, Normalization) else None
    return GroupNormalized(norm, Joined(activation)) if activation else norm
