"""What is wrong with a model's batch normalizations, where, and how much each cure helps."""

from batchnorm.doctor.diagnose import diagnose
from batchnorm.doctor.diagnosis import Diagnosis, Effect, Finding, LayerFacts

__all__ = ["Diagnosis", "Effect", "Finding", "LayerFacts", "diagnose"]
