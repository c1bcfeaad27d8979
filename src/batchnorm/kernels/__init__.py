"""Algorithm 1: its kernels, the choice between them, the operators, and the activations they carry."""

from batchnorm.kernels.dispatch import use
from batchnorm.kernels.heap import keep_freed_memory

__all__ = ["keep_freed_memory", "use"]
