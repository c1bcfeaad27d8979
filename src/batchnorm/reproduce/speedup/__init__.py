"""Section 4.2, figures 2 and 3: the networks of the ImageNet experiments, accuracy against steps."""

from batchnorm.reproduce.speedup.experiment import Speedup
from batchnorm.reproduce.speedup.run import run_experiment

__all__ = ["Speedup", "run_experiment"]
