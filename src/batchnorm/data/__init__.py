"""Image data by name, and the order in which training sees it."""

from batchnorm.data.batches import batch_indices, epoch_order, to_input
from batchnorm.data.sources import SOURCES, ImageData, load

__all__ = ["SOURCES", "ImageData", "batch_indices", "epoch_order", "load", "to_input"]
