"""Batches large enough for the fused kernels, on two ranks; run by `test_synced`."""

import torch
from synced_layers import a_layer

from batchnorm import layers

LARGE = (6, 40, 41)
PAIR = layers.BatchNorm2d, layers.SyncedBatchNorm2d
CASES = {
    "relu and residual": a_layer(*PAIR, LARGE, dtype=torch.float32, activation="relu", residual=True),
    "far from zero": a_layer(
        *PAIR, LARGE, dtype=torch.float32, activation="relu", residual=True, shift=300.0
    ),
}
