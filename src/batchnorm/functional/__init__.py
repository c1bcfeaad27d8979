"""Batch Normalization as pure functions of tensors; running averages are the layers' business."""

from batchnorm.functional.ghost import ghost_batch_norm
from batchnorm.functional.plain import ACTIVATIONS, as_rows, batch_norm, check_arguments, normalize_with
from batchnorm.functional.renorm import batch_renorm

__all__ = [
    "ACTIVATIONS",
    "as_rows",
    "batch_norm",
    "batch_renorm",
    "check_arguments",
    "ghost_batch_norm",
    "normalize_with",
]
