"""Algorithm 1: its kernels, the choice between them, the operators, and the activations they carry."""

from batchnorm.kernels.dispatch import use

__all__ = ["use"]
