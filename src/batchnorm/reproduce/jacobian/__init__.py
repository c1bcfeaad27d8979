"""Section 3.3: the conjecture that layers' Jacobians have singular values near 1."""

from batchnorm.reproduce.jacobian.experiment import Jacobian
from batchnorm.reproduce.jacobian.run import run_experiment

__all__ = ["Jacobian", "run_experiment"]
