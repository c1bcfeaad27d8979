"""Section 2: what happens when the gradient does not see the normalization."""

from batchnorm.reproduce.divergence.experiment import Divergence
from batchnorm.reproduce.divergence.run import run_experiment

__all__ = ["Divergence", "run_experiment"]
