"""Batch normalizations that are frozen by their class, as torchvision's: found, checked, made ours."""

import copy
from typing import Any

import torch
from torch import nn

from batchnorm.layers import BatchNorm2d


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


def frozen_obstacle(layer: nn.Module) -> str:
    """Why a layer frozen by class cannot become ours: it computes something of its own; empty if it can."""
    twin = copy.deepcopy(layer)
    unfreeze_class(twin)
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


def unfreeze_class(layer: Any) -> None:
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
