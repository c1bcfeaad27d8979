"""Batch Normalization for PyTorch: put it in, train it, see it, fold it away.

Source: Ioffe & Szegedy (2015), arXiv 1502.03167.
"""

from batchnorm import distributed, functional
from batchnorm.choosing import choose
from batchnorm.deploy import export
from batchnorm.diagnostics import watch
from batchnorm.doctor import diagnose
from batchnorm.layers import (
    AccumulatedBatchNorm1d,
    AccumulatedBatchNorm2d,
    AccumulatedBatchNorm3d,
    AccumulatedBatchNormPerActivation,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormGRU,
    BatchNormGRUCell,
    BatchNormLSTM,
    BatchNormLSTMCell,
    BatchNormPerActivation,
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    BatchRenormPerActivation,
    EvalNorm1d,
    EvalNorm2d,
    EvalNorm3d,
    EvalNormPerActivation,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    GhostBatchNormPerActivation,
    Ramp,
    SyncedBatchNorm1d,
    SyncedBatchNorm2d,
    SyncedBatchNorm3d,
    SyncedBatchNormPerActivation,
    WhitenedBatchNorm1d,
    WhitenedBatchNorm2d,
    WhitenedBatchNorm3d,
)
from batchnorm.moments import Moments
from batchnorm.statistics import Domains, DriftAlarm, adapt, commit_on_step, pool_statistics, recalibrate
from batchnorm.surgery import accelerate, convert, fold, freeze, insert, parameter_groups, thaw

__version__ = "0.1.0"

__all__ = [
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
    "Domains",
    "DriftAlarm",
    "EvalNorm1d",
    "EvalNorm2d",
    "EvalNorm3d",
    "EvalNormPerActivation",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GhostBatchNormPerActivation",
    "Moments",
    "Ramp",
    "SyncedBatchNorm1d",
    "SyncedBatchNorm2d",
    "SyncedBatchNorm3d",
    "SyncedBatchNormPerActivation",
    "WhitenedBatchNorm1d",
    "WhitenedBatchNorm2d",
    "WhitenedBatchNorm3d",
    "accelerate",
    "adapt",
    "choose",
    "commit_on_step",
    "convert",
    "diagnose",
    "distributed",
    "export",
    "fold",
    "freeze",
    "functional",
    "insert",
    "parameter_groups",
    "pool_statistics",
    "recalibrate",
    "thaw",
    "watch",
]
