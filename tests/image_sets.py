"""Folders of images for tests: small ones made here, and the photographs of shared/data if they are there."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(number: int, width: int = 40, height: int = 30, format: str = "JPEG") -> bytes:
    """A picture that no other number has: eight by six patches of random colours."""
    patches = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(patches).resize((width, height), Image.Resampling.BILINEAR).save(out, format, quality=90)
    return out.getvalue()


def write_folder(root: Path, train: dict[str, int], val: dict[str, int] | None = None) -> Path:
    """``train/CLASS`` and ``val/CLASS`` with these numbers of pictures; every picture is another one."""
    number = 0
    for part, counts in (("train", train), ("val", val or dict.fromkeys(train, 1))):
        for name, count in counts.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:03d}.jpg").write_bytes(picture(number))
                number += 1
    return root


def photographs() -> Path:
    """100 class folders with one ImageNet photograph each; skips where they are not."""
    for folder in (os.environ.get("BATCHNORM_DATA"), Path(__file__).parents[2] / "shared" / "data"):
        if folder and (sample := Path(folder) / "imagenet-sample").is_dir():
            return sample
    pytest.skip("no photographs on this machine: set BATCHNORM_DATA to a folder that holds imagenet-sample/")


def photograph_folder(root: Path) -> Path:
    """The photographs as ``train/`` and once more as ``val/``, by links."""
    for part in ("train", "val"):
        (root / part).mkdir(parents=True)
        for folder in photographs().iterdir():
            if folder.is_dir():
                (root / part / folder.name).symlink_to(folder)
    return root
