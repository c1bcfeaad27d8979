"""Section 4.1, figure 1: activations over time, with and without BN, on digits."""

from batchnorm.reproduce.activations.experiment import Activations
from batchnorm.reproduce.activations.run import run_experiment

__all__ = ["Activations", "run_experiment"]
