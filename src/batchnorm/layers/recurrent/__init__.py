"""Recurrent layers with statistics of each time step."""

from batchnorm.layers.recurrent.cells import BatchNormGRUCell, BatchNormLSTMCell
from batchnorm.layers.recurrent.layers import BatchNormGRU, BatchNormLSTM
from batchnorm.layers.recurrent.stepwise import StepBatchNorm, StepwiseBatchNorm

__all__ = [
    "BatchNormGRU",
    "BatchNormGRUCell",
    "BatchNormLSTM",
    "BatchNormLSTMCell",
    "StepBatchNorm",
    "StepwiseBatchNorm",
]
