"""How far a layer's running statistics are from the batch that it is given."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.moments import Moments


@dataclass(frozen=True)
class Running:
    """Running statistics as they stood before a batch, and the moments of that batch.

    Attributes:
        mean: Running mean, shape (C,).
        var: Running variance (unbiased), shape (C,).
        eps: The layer's.
        batch: Moments of the layer's input.
    """

    mean: Tensor
    var: Tensor
    eps: float
    batch: Moments

    @classmethod
    def of(cls, layer: _BatchNorm, batch: Moments) -> "Running":
        """A copy of the layer's running statistics, which its forward is about to move."""
        mean, var = (
            t.detach().flatten().to(batch.mean, copy=True) for t in (layer.running_mean, layer.running_var)
        )
        return cls(mean, var, layer.eps, batch)

    def merge(self, other: "Running") -> "Running":
        """The batches of two calls of the layer together, beside what stood before the first."""
        return Running(self.mean, self.var, self.eps, self.batch.merge(other.batch))

    def gaps(self) -> tuple[float, float]:
        """Distance of the means in deviations, and of the deviations in natural logarithms.

        For each channel: |running mean − batch mean| / σ, with σ² the mean of the running and the
        (unbiased) batch variance and of eps; and |ln(running deviation / batch deviation)|, eps
        added to either variance. Averaged over channels; nan if any of it is.
        """
        tensors = (self.mean, self.var, self.batch.mean, self.batch.unbiased())
        # In one piece from the device, and then without torch, which is slow with a hundred numbers.
        mean, var, batch_mean, batch_var = torch.stack(tensors).cpu().double().numpy()
        if not mean.size:
            return math.nan, math.nan
        with np.errstate(invalid="ignore"):
            std = np.sqrt((var + batch_var) / 2 + self.eps)
            ratio = np.log((var + self.eps) / (batch_var + self.eps)) / 2
            return float((abs(mean - batch_mean) / std).mean()), float(abs(ratio).mean())
