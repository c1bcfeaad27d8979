"""What a worker of a stream makes: one batch, from nothing but its number."""

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from batchnorm.data.batches import Share, Shuffle, step_indices
from batchnorm.data.crops import Crop, evaluation_crops, random_area_box
from batchnorm.data.decode import BadImage, read_crop, read_crops
from batchnorm.data.folders import ImageSet


class Batch(NamedTuple):
    """Decoded images of one rank."""

    images: Tensor
    """uint8, shape (n, 3, size, size) in training, (n, crops, 3, size, size) in evaluation."""
    labels: Tensor
    """int64, shape (n,)."""
    numbers: Tensor
    """int64, shape (n,): the images' numbers in their set."""


class BadImages(ValueError):
    """More images are bad than can be an accident."""


class Made(NamedTuple):
    """What a worker sends."""

    batch: Batch | None
    """None where every image is bad, or after an error."""
    num_seen: int
    """Images that it tried to decode."""
    bad: tuple[str, ...]
    """Names and reasons of those that it could not."""
    error: Exception | None
    """What the stream shall raise; DataLoader would put a worker's whole traceback into the message."""


class Decoder:
    """Decodes images by their numbers, and keeps count."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.num_seen = 0
        self.bad: list[str] = []

    def decode(self, number: int, crop: Callable[[bytes, str], np.ndarray]) -> np.ndarray | None:
        """What ``crop(data, name)`` makes of an image; None if that is bad, which is noted.

        Raises:
            RuntimeError: Something else went wrong; the message names the image.
        """
        self.num_seen += 1
        name = self.images.name(number)
        try:
            return crop(self.images.read(number), name)
        except BadImage as error:
            self.bad.append(str(error))
        except OSError as error:
            # A file that went away, or a sector that did: as bad as one whose content is no image.
            self.bad.append(f"{name}: cannot be read ({error.strerror or error})")
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        return None


class Batches(Dataset[Made], ABC):
    """Batches by their number in a stream."""

    images: ImageSet

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def make(self, number: int, decoder: Decoder) -> Batch | None:
        """The batch of this number, or None where all its images are bad."""

    def __getitem__(self, number: int) -> Made:
        decoder = Decoder(self.images)
        batch, failure = None, None
        try:
            batch = self.make(number, decoder)
        except Exception as error:
            # The traceback itself does not survive the way to another process.
            error.add_note("".join(traceback.format_exception(error)))
            failure = error
        return Made(batch, decoder.num_seen, tuple(decoder.bad), failure)


@dataclass(frozen=True, kw_only=True)
class TrainingBatches(Batches):
    """See `training_stream`, which has the same arguments."""

    images: ImageSet
    start_step: int
    num_steps: int
    batch_size: int
    size: int
    seed: int
    shuffle: Shuffle
    mirror: bool
    rank: int
    world_size: int
    num_parts: int
    stride: int

    def __len__(self) -> int:
        return self.num_steps

    def numbers(self, number: int) -> tuple[int, list[int]]:
        """The epoch of a step, and this rank's part of its images."""
        epoch, numbers = step_indices(
            self.start_step + number * self.stride,
            self.batch_size,
            len(self.images),
            self.seed,
            shards=self.images.shards,
            shuffle=self.shuffle,
        )
        share = Share.of(self.batch_size, self.rank, self.world_size, self.num_parts)
        return epoch, share.take(numbers).tolist()

    def make(self, number: int, decoder: Decoder) -> Batch:
        """Crop and mirror at random; images of the next numbers stand in for bad ones."""
        epoch, wanted = self.numbers(number)
        pixels = torch.empty(len(wanted), 3, self.size, self.size, dtype=torch.uint8)
        shown = []
        for place, first in zip(pixels.numpy(), wanted, strict=True):
            for image in (*range(first, len(self.images)), *range(first)):
                crop = decoder.decode(image, _RandomCrop(self.seed, epoch, image, self.size, self.mirror))
                if crop is not None:
                    place[:] = crop
                    shown.append(image)
                    break
            else:
                raise BadImages(f"None of the {len(self.images)} images can be decoded: {decoder.bad[0]}")
        numbers = torch.tensor(shown, dtype=torch.int64)
        return Batch(pixels, torch.from_numpy(self.images.labels[numbers.numpy()]), numbers)


@dataclass(frozen=True, kw_only=True)
class EvaluationBatches(Batches):
    """See `evaluation_stream`; the images from number ``first`` up to ``end``."""

    images: ImageSet
    crops: Literal[1, 10, 144]
    size: int
    batch_size: int
    first: int
    end: int

    def __len__(self) -> int:
        return -(-(self.end - self.first) // self.batch_size)

    def make(self, number: int, decoder: Decoder) -> Batch | None:
        """Cut the fixed crops; bad images are left out."""
        first = self.first + number * self.batch_size
        wanted = range(first, min(first + self.batch_size, self.end))
        pixels = torch.empty(len(wanted), self.crops, 3, self.size, self.size, dtype=torch.uint8)
        places = pixels.numpy()
        shown: list[int] = []
        for image in wanted:
            crops = decoder.decode(image, self._crop)
            if crops is not None:
                places[len(shown)] = crops
                shown.append(image)
        if not shown:
            return None
        labels = torch.from_numpy(self.images.labels[shown])
        return Batch(pixels[: len(shown)], labels, torch.tensor(shown))

    def _crop(self, data: bytes, name: str) -> np.ndarray:
        def choose(width: int, height: int) -> list[Crop]:
            return evaluation_crops(width, height, self.crops, self.size)

        return read_crops(data, choose, self.size, name=name)


class _RandomCrop(NamedTuple):
    """The one random crop that an image has in an epoch."""

    seed: int
    epoch: int
    image: int
    size: int
    mirror: bool

    def __call__(self, data: bytes, name: str) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch, self.image])

        def choose(width: int, height: int) -> Crop:
            mirrored = rng.random() < 0.5 and self.mirror
            return Crop(random_area_box(width, height, rng), mirrored)

        return read_crop(data, choose, self.size, name=name)
