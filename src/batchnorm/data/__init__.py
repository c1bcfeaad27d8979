"""Image data by name, and the order in which training sees it."""

from batchnorm.data.augment import crop_batch, distort, shift_and_mirror, standardize
from batchnorm.data.batches import (
    Shuffle,
    batch_indices,
    epoch_order,
    shuffled_order,
    step_indices,
    to_input,
)
from batchnorm.data.crops import Box, Crop, evaluation_crops, random_area_box
from batchnorm.data.sources import SOURCES, ImageData, load

__all__ = [
    "SOURCES",
    "Box",
    "Crop",
    "ImageData",
    "Shuffle",
    "batch_indices",
    "crop_batch",
    "distort",
    "epoch_order",
    "evaluation_crops",
    "load",
    "random_area_box",
    "shift_and_mirror",
    "shuffled_order",
    "standardize",
    "step_indices",
    "to_input",
]
