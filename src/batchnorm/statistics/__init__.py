"""Running and population statistics: what a batch-normalized network uses once training is over."""

from batchnorm.statistics.commit import CommitHandle, commit_on_step
from batchnorm.statistics.metric import MetricChange
from batchnorm.statistics.pool import PooledLayer, PoolReport, pool_statistics
from batchnorm.statistics.population import Population
from batchnorm.statistics.recalibrate import recalibrate
from batchnorm.statistics.recalibration_report import LayerChange, RecalibrationReport

__all__ = [
    "CommitHandle",
    "LayerChange",
    "MetricChange",
    "PoolReport",
    "PooledLayer",
    "Population",
    "RecalibrationReport",
    "commit_on_step",
    "pool_statistics",
    "recalibrate",
]
