"""What batch normalizations hold, taken out and put back."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

State = dict[str, dict[str, Tensor]]
"""By the layer's path and the tensor's name."""

STATISTICS = ("running_mean", "running_var", "running_cov", "num_batches_tracked")
LEARNED = ("weight", "bias")


def state_of(layers: dict[str, _BatchNorm], names: Iterable[str] = (*LEARNED, *STATISTICS)) -> State:
    """Copies of the layers' tensors of these names, where they have them."""
    names = tuple(names)
    found = {
        path: {name: t for name in names if (t := getattr(layer, name, None)) is not None}
        for path, layer in layers.items()
    }
    return {path: {name: t.detach().clone() for name, t in of.items()} for path, of in found.items()}


@torch.no_grad()
def put_state(layers: dict[str, _BatchNorm], state: State) -> None:
    """Give the layers' tensors, wherever they are now, the values of ``state``."""
    for path, tensors in state.items():
        for name, value in tensors.items():
            getattr(layers[path], name).copy_(value)
