"""Images a second that one core makes of JPEG files: ours beside a plain PyTorch data set."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from batchnorm.bench.timing import Timing, in_turns
from batchnorm.data.batches import step_indices
from batchnorm.data.crops import random_area_box
from batchnorm.data.folders import ImageFolder, ImageSet
from batchnorm.data.pack_shard import write_shard
from batchnorm.data.shards import ImageShards
from batchnorm.data.stream import training_stream

FOLDER, SHARDS = "batchnorm, folder", "batchnorm, shards"
PLAIN, PLAIN_FLOAT = "Dataset + Pillow", "Dataset + Pillow, float32"
SEED = 0


def measure(
    data: Path, *, size: int = 224, batch: int = 32, num_images: int = 320, rounds: int = 9
) -> dict[str, Any]:
    """Time random-area crops, mirrored at random, of the same images by each contender, in this process.

    All of them read the same files in the same order, cut the same boxes, and give batches: uint8 of
    shape (batch, 3, size, size), but for one, which gives the float32 between 0 and 1 that such data
    sets usually give. The files are in the system's cache after the first pass: no disk is measured.

    Args:
        data: Folder of images, as ``CLASS/IMAGE`` or ``train/CLASS/IMAGE``; its shards are packed for
            the occasion.
        size: Side of the crops, pixels.
        batch: Images of a batch; fewer if the folder has fewer.
        num_images: Of a sample, rounded up to whole batches; epochs follow each other.
        rounds: Samples of each contender.

    Returns:
        Images a second of each contender (median and quartiles), the ratios that matter, and the
        difference between our levels and those of the plain data set: the median over images of its mean.

    Raises:
        FileNotFoundError: The folder is not there.
        ValueError: It has no images, or some that cannot be read.
    """
    folder = ImageFolder(data / "train" if (data / "train").is_dir() else data)
    batch = min(batch, len(folder))
    plan = _Plan(size, batch, -(-num_images // batch))
    with TemporaryDirectory(prefix="batchnorm-") as scratch:
        shard = Path(scratch) / "train-000000.tar"
        write_shard(shard, folder, range(len(folder)), _refuse)
        shards = ImageShards([shard], folder.classes)
        contenders: dict[str, Callable[[], Iterator[Tensor]]] = {
            FOLDER: lambda: plan.ours(folder),
            SHARDS: lambda: plan.ours(shards),
            PLAIN: lambda: plan.plain(folder),
            PLAIN_FLOAT: lambda: plan.plain(folder, as_float=True),
        }
        difference = _difference(contenders[FOLDER](), contenders[PLAIN]())
        timings = in_turns(
            {name: partial(_exhaust, make) for name, make in contenders.items()},
            rounds=rounds,
            slice_s=0.0,
        )
    num_crops = plan.num_steps * batch
    return {
        "images": f"{num_crops} crops of {len(folder)} images, {size}×{size}, in batches of {batch}",
        "images_per_s": {name: plan.rates(timing) for name, timing in timings.items()},
        "ratios": _ratios({name: timing.median_s for name, timing in timings.items()}),
        "difference_levels": round(difference, 3),
    }


def _ratios(seconds: dict[str, float]) -> dict[str, float]:
    ratios = {f"{FOLDER}, over {rival}": seconds[rival] / seconds[FOLDER] for rival in (PLAIN, PLAIN_FLOAT)}
    ratios[f"{SHARDS}, over {FOLDER}"] = seconds[FOLDER] / seconds[SHARDS]
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


@dataclass(frozen=True)
class _Plan:
    size: int
    batch: int
    num_steps: int

    def ours(self, images: ImageSet) -> Iterator[Tensor]:
        """Batches as training gets them."""
        with training_stream(
            images, start_step=0, num_steps=self.num_steps, batch_size=self.batch, size=self.size, seed=SEED
        ) as stream:
            for made in stream:
                yield made.images
            if stream.bad:
                _refuse(stream.bad[0])

    def plain(self, images: ImageFolder, *, as_float: bool = False) -> Iterator[Tensor]:
        """The same batches by a data set as it is usually written."""
        steps = (step_indices(step, self.batch, len(images), SEED) for step in range(self.num_steps))
        wanted = [[(epoch, number) for number in numbers.tolist()] for epoch, numbers in steps]
        yield from DataLoader(PlainImages(images, self.size, as_float), batch_sampler=wanted)

    def rates(self, timing: Timing) -> list[float]:
        """Images a second: median, lower and upper quartile."""
        seconds = (timing.median_s, timing.high_s, timing.low_s)
        return [round(self.num_steps * self.batch / s, 1) for s in seconds]


@dataclass(frozen=True)
class PlainImages(Dataset[Tensor]):
    """A data set of image files as it is usually written: open, convert, crop, resize, mirror, to tensor.

    Its keys are pairs of epoch and number, and its crops those of `training_stream`.
    """

    images: ImageFolder
    size: int
    as_float: bool = False

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        epoch, number = key
        rng = np.random.default_rng([SEED, epoch, number])
        image: Image.Image = Image.open(self.images.name(number)).convert("RGB")
        mirrored = rng.random() < 0.5
        left, top, width, height = random_area_box(image.width, image.height, rng)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div_(255) if self.as_float else pixels


def _difference(ours: Iterator[Tensor], plain: Iterator[Tensor]) -> float:
    found = [(a.float() - b.float()).abs().mean(dim=(1, 2, 3)) for a, b in zip(ours, plain, strict=True)]
    return torch.cat(found).median().item()


def _exhaust(make: Callable[[], Iterator[Tensor]]) -> None:
    for _ in make():
        pass


def _refuse(reason: str) -> NoReturn:
    raise ValueError(f"{reason} Every image that is measured must be whole.")
