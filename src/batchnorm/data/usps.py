"""USPS: postal digits of 16×16 pixels, a second domain beside MNIST."""

from pathlib import Path

import numpy as np

from batchnorm.reading import read_arrays

FILE = "usps.npz"
SIZE, FRAMED = 16, 28
"""Sides as scanned, and as MNIST has its digits."""
_BOX = 20
"""MNIST's digits were fitted into so many pixels in the middle of its images; USPS's fill theirs."""
_MAX_BYTES = 1 << 26
_PARTS = ("x_train", "y_train", "x_test", "y_test")


def read_usps(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read the arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test`` of an .npz file.

    Returns:
        Training images, uint8 of shape (N, 16, 16), and labels, int64; then those for testing.

    Raises:
        ValueError: The file is damaged, or its arrays are others.
        OSError: It cannot be read.

    Source: Hull (1994), A Database for Handwritten Text Recognition Research.
    """
    arrays = read_arrays(path, _MAX_BYTES)
    if missing := [name for name in _PARTS if name not in arrays]:
        raise ValueError(f"{path} has no array {missing[0]!r}: needed are {', '.join(_PARTS)}")
    for name in ("x_train", "x_test"):
        if arrays[name].dtype != np.uint8 or arrays[name].shape[1:] != (SIZE, SIZE):
            raise ValueError(
                f"{path}: {name} must be uint8 of shape (N, {SIZE}, {SIZE}), got {arrays[name].dtype} of "
                f"shape {arrays[name].shape}"
            )
    for name in ("y_train", "y_test"):
        if arrays[name].dtype.kind not in "iu":
            raise ValueError(f"{path}: {name} must be whole numbers, got {arrays[name].dtype}")
    x_train, y_train, x_test, y_test = (arrays[name] for name in _PARTS)
    return x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64)


def framed(images: np.ndarray) -> np.ndarray:
    """Images of 16×16 as MNIST would have them: bilinearly enlarged to 20×20, in the middle of 28×28.

    Args:
        images: uint8 of shape (N, 16, 16).
    """
    import torch
    from torch.nn.functional import interpolate

    levels = torch.from_numpy(images).unsqueeze(1).float()
    larger = interpolate(levels, (_BOX, _BOX), mode="bilinear", align_corners=False)
    margin = (FRAMED - _BOX) // 2
    return np.pad(larger[:, 0].round().to(torch.uint8).numpy(), ((0, 0), *[(margin, margin)] * 2))
