"""Section 4.2.3, figure 4: single crops, many crops, and six networks together."""

from batchnorm.reproduce.ensemble.experiment import Ensemble
from batchnorm.reproduce.ensemble.run import run_experiment

__all__ = ["Ensemble", "run_experiment"]
