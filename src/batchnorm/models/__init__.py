"""Networks of the paper."""

from batchnorm.models.inception import inception
from batchnorm.models.mlp import mlp

__all__ = ["inception", "mlp"]
