"""The layers: nn.Modules, and the only place where running statistics move."""

from batchnorm.layers.adopt import adopt
from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormPerActivation
from batchnorm.layers.ghost import (
    Ghost,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormPerActivation,
)
from batchnorm.layers.joined import Joined
from batchnorm.layers.synced import (
    Synced,
    SyncedBatchNorm1d,
    SyncedBatchNorm2d,
    SyncedBatchNorm3d,
    SyncedBatchNormPerActivation,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormPerActivation",
    "Ghost",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostBatchNormPerActivation",
    "Joined",
    "Normalization",
    "Synced",
    "SyncedBatchNorm1d",
    "SyncedBatchNorm2d",
    "SyncedBatchNorm3d",
    "SyncedBatchNormPerActivation",
    "adopt",
]
