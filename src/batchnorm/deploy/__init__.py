"""From a trained model to a file that another program runs, checked before and after it is written."""

from batchnorm.deploy.compare import Comparison
from batchnorm.deploy.export import ExportReport, export
from batchnorm.deploy.gate import Problem, problems_of

__all__ = ["Comparison", "ExportReport", "Problem", "export", "problems_of"]
