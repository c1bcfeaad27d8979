"""Image data by name, and the order in which training sees it."""

from batchnorm.data.augment import crop_batch, crop_each, distort, shift_and_mirror, standardize
from batchnorm.data.batches import (
    Share,
    Shuffle,
    batch_indices,
    epoch_order,
    shuffled_order,
    step_indices,
    to_input,
)
from batchnorm.data.cores import num_cores
from batchnorm.data.crops import Box, Crop, evaluation_crops, random_area_box
from batchnorm.data.folders import ImageFiles, open_images
from batchnorm.data.sources import SOURCES, ImageData, load

__all__ = [
    "SOURCES",
    "Box",
    "Crop",
    "ImageData",
    "ImageFiles",
    "Share",
    "Shuffle",
    "batch_indices",
    "crop_batch",
    "crop_each",
    "distort",
    "epoch_order",
    "evaluation_crops",
    "load",
    "num_cores",
    "open_images",
    "random_area_box",
    "shift_and_mirror",
    "shuffled_order",
    "standardize",
    "step_indices",
    "to_input",
]
