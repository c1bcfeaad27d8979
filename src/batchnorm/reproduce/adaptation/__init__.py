"""Networks in other domains than their own, before and after their normalizations are adapted."""

from batchnorm.reproduce.adaptation.experiment import Adaptation
from batchnorm.reproduce.adaptation.run import run_experiment

__all__ = ["Adaptation", "run_experiment"]
