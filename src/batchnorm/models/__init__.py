"""Networks of the paper."""

from batchnorm.models.mlp import mlp

__all__ = ["mlp"]
