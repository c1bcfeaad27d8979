"""`batchnorm shards`: a folder of images into tar files."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from batchnorm.data.folders import PER_SHARD
from batchnorm.data.pack import Packed, PackedPart, pack

DESCRIPTION = """\
Pack a folder of images (train/CLASS/NAME.jpg, val/CLASS/NAME.jpg) into uncompressed tar files of the
webdataset format, with the classes mixed. The images' bytes stay as they are.

Every shard is read again and compared with its images before it counts. Stopped by Ctrl-C, a full disk or
a crash, the same command goes on after the last finished shard. Files that are no images are left out
and named; if they are more than 1 %, packing stops.

Examples:
  batchnorm shards photos shards
  batchnorm shards imagenet /mnt/fast/imagenet --per-shard 10000
  batchnorm shards imagenet /mnt/fast/imagenet --shard-bytes 1000000000
  batchnorm train bn-x5 --data shards --out runs/bn-x5
"""


@dataclass(frozen=True, kw_only=True)
class ShardsArguments:
    """What `batchnorm shards` is told."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Holds train/ and val/, each with one folder for each class."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Where the shards go: a new or empty folder, or that of a packing which was stopped."""
    per_shard: int = PER_SHARD
    """Images of a shard."""
    shard_bytes: int | None = None
    """Bytes that a shard may have, instead of a number of images."""
    seed: int = 0
    """Of the order. With 0, and 1000 images a shard, folder and shards train alike to the bit."""
    progress: bool = True
    """Draw a bar on standard error when that is a terminal."""


def run(argv: list[str]) -> None:
    """Parse `argv`, pack, and print what lies where."""
    arguments = tyro.cli(ShardsArguments, prog="batchnorm shards", description=DESCRIPTION, args=argv)
    try:
        packed = pack(
            arguments.folder,
            arguments.out,
            per_shard=arguments.per_shard,
            shard_bytes=arguments.shard_bytes,
            seed=arguments.seed,
            progress=arguments.progress,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; finished shards are kept, and the same command goes on") from None
    sys.stdout.write(_described(packed))


def _described(packed: Packed) -> str:
    lines = [
        f"{packed.out}: {len(packed.classes)} classes",
        *(_line(name, part) for name, part in (("train", packed.train), ("val", packed.val))),
    ]
    if skipped := [*packed.train.skipped, *packed.val.skipped]:
        lines += [f"{len(skipped)} left out:", *(f"  {reason}" for reason in skipped)]
    return "\n".join([*lines, f"Use them as --data {packed.out}", ""])


def _line(name: str, part: PackedPart) -> str:
    kept = f" ({part.num_kept} from before)" if part.num_kept else ""
    size = f"{part.num_bytes / 1e6:,.1f} MB"
    return f"  {name}: {part.num_images} images in {len(part.shards)} shards{kept}, {size}"
