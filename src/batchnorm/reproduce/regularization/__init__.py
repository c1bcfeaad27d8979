"""Section 3.4: BN as a regularizer, beside dropout, at several batch sizes."""

from batchnorm.reproduce.regularization.experiment import Regularization
from batchnorm.reproduce.regularization.run import run_experiment

__all__ = ["Regularization", "run_experiment"]
