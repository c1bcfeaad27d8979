"""Running and population statistics: what a batch-normalized network uses once training is over."""

from batchnorm.statistics.adapt import adapt
from batchnorm.statistics.adaptation_report import AdaptationReport
from batchnorm.statistics.alarm import Attached, DriftAlarm, DriftCheck
from batchnorm.statistics.commit import CommitHandle, commit_on_step
from batchnorm.statistics.domains import Domains
from batchnorm.statistics.example_weights import FittedWeight, FittedWeights, fit_example_weights
from batchnorm.statistics.metric import MetricChange
from batchnorm.statistics.pool import PooledLayer, PoolReport, pool_statistics
from batchnorm.statistics.population import Population
from batchnorm.statistics.predictions import Predictions
from batchnorm.statistics.recalibrate import recalibrate
from batchnorm.statistics.recalibration_report import LayerChange, RecalibrationReport

__all__ = [
    "AdaptationReport",
    "Attached",
    "CommitHandle",
    "Domains",
    "DriftAlarm",
    "DriftCheck",
    "FittedWeight",
    "FittedWeights",
    "LayerChange",
    "MetricChange",
    "PoolReport",
    "PooledLayer",
    "Population",
    "Predictions",
    "RecalibrationReport",
    "adapt",
    "commit_on_step",
    "fit_example_weights",
    "pool_statistics",
    "recalibrate",
]
