"""Section 3.3: the scale of the weights before a normalization does not matter, and where it does."""

from batchnorm.reproduce.invariance.experiment import Invariance
from batchnorm.reproduce.invariance.run import run_experiment

__all__ = ["Invariance", "run_experiment"]
