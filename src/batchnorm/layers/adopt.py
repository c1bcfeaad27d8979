"""Making torch's own layers ours, in place."""

from torch import nn

from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

_OURS: dict[type[nn.Module], type[Normalization]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


def adopt(layer: nn.Module) -> Normalization:
    """Turn a plain `torch.nn` BatchNorm into our layer of the same kind, in place.

    Parameters, buffers, hooks, flags and every reference to the module stay; running
    statistics in half precision are widened to float32.

    Args:
        layer: Exactly a `torch.nn.BatchNorm1d`, `2d` or `3d`, or a layer of ours (returned as is).

    Returns:
        ``layer`` itself.

    Raises:
        TypeError: The layer is of another class; its behaviour is not known here.
    """
    if isinstance(layer, Normalization):
        return layer
    ours = _OURS.get(type(layer))
    if ours is None:
        raise TypeError(
            f"only torch.nn.BatchNorm1d, 2d and 3d themselves can be adopted, got {type(layer).__name__}; "
            f"replace it by a layer of batchnorm by hand"
        )
    layer.__class__ = ours
    assert isinstance(layer, Normalization)
    layer._become(activation=None, channel_dim=1)
    return layer
