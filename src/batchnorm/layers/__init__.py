"""The layers: nn.Modules, and the only place where running statistics move."""

from batchnorm.layers.accumulated import (
    Accumulated,
    AccumulatedBatchNorm1d,
    AccumulatedBatchNorm2d,
    AccumulatedBatchNorm3d,
    AccumulatedBatchNormPerActivation,
)
from batchnorm.layers.adopt import adopt
from batchnorm.layers.base import Normalization
from batchnorm.layers.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormPerActivation
from batchnorm.layers.evalnorm import EvalNorm, EvalNorm1d, EvalNorm2d, EvalNorm3d, EvalNormPerActivation
from batchnorm.layers.ghost import (
    Ghost,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormPerActivation,
)
from batchnorm.layers.joined import Joined
from batchnorm.layers.ramp import Ramp
from batchnorm.layers.recurrent import (
    BatchNormGRU,
    BatchNormGRUCell,
    BatchNormLSTM,
    BatchNormLSTMCell,
    StepwiseBatchNorm,
)
from batchnorm.layers.renorm import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    BatchRenormPerActivation,
    Renorm,
)
from batchnorm.layers.synced import (
    Synced,
    SyncedBatchNorm1d,
    SyncedBatchNorm2d,
    SyncedBatchNorm3d,
    SyncedBatchNormPerActivation,
)
from batchnorm.layers.whitened import Whitened, WhitenedBatchNorm1d, WhitenedBatchNorm2d, WhitenedBatchNorm3d

__all__ = [
    "Accumulated",
    "AccumulatedBatchNorm1d",
    "AccumulatedBatchNorm2d",
    "AccumulatedBatchNorm3d",
    "AccumulatedBatchNormPerActivation",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormGRU",
    "BatchNormGRUCell",
    "BatchNormLSTM",
    "BatchNormLSTMCell",
    "BatchNormPerActivation",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "BatchRenormPerActivation",
    "EvalNorm",
    "EvalNorm1d",
    "EvalNorm2d",
    "EvalNorm3d",
    "EvalNormPerActivation",
    "Ghost",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostBatchNormPerActivation",
    "Joined",
    "Normalization",
    "Ramp",
    "Renorm",
    "StepwiseBatchNorm",
    "Synced",
    "SyncedBatchNorm1d",
    "SyncedBatchNorm2d",
    "SyncedBatchNorm3d",
    "SyncedBatchNormPerActivation",
    "Whitened",
    "WhitenedBatchNorm1d",
    "WhitenedBatchNorm2d",
    "WhitenedBatchNorm3d",
    "adopt",
]
