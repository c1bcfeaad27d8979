"""Recurrent networks: sequential digits by an LSTM with and without BN, and gradients through time."""

from batchnorm.reproduce.recurrent.experiment import Recurrent
from batchnorm.reproduce.recurrent.run import run_experiment

__all__ = ["Recurrent", "run_experiment"]
