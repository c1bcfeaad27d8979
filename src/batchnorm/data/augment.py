"""Random changes of training images, made on the whole batch: a function of the images and a generator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from batchnorm.data.batches import Share
from batchnorm.data.crops import Box, Crop

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue over ImageNet's training images, on the scale from 0 to 1."""
GREY = (0.299, 0.587, 0.114)
"""Luma weights of red, green and blue (ITU-R BT.601)."""
DISTORTION = 0.5
"""Brightness, contrast and colour are multiplied by a factor of 1 ± this, at full strength."""


def shift_and_mirror(
    images: Tensor,
    generator: torch.Generator,
    *,
    reach: int,
    mirror: bool = True,
    share: Share | None = None,
) -> Tensor:
    """Each image moved by up to ``reach`` pixels either way, and every second one mirrored.

    Args:
        images: uint8, shape (N, 3, H, W), any device.
        generator: On the CPU; three draws for each image.
        reach: Pixels; what comes in from outside is the middle grey.
        mirror: Whether any is mirrored.
        share: Of what batch the images are which part: it is drawn for all of it. None: they are all.

    Returns:
        uint8, same shape, in channels-last memory.
    """
    num, _, height, width = images.shape
    total = num if share is None else share.total
    shifts = torch.randint(0, 2 * reach + 1, (2, total, 1), generator=generator)
    mirrored = mirror & (torch.rand(total, 1, generator=generator) < 0.5)
    if share is not None:
        shifts, mirrored = share.take(shifts, 1), share.take(mirrored)
    rows = torch.arange(height) + shifts[0]
    columns = torch.arange(width).expand(num, width)
    columns = torch.where(mirrored, width - 1 - columns, columns) + shifts[1]
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = torch.nn.functional.pad(images, [reach] * 4, value=128)
    numbers = torch.arange(num, device=images.device)
    # Indices around a slice put the channels last: shape (N, H, W, 3).
    return padded[numbers[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def distort(
    images: Tensor, generator: torch.Generator, *, strength: float = 1.0, share: Share | None = None
) -> Tensor:
    """Photometric distortion: brightness, contrast and colour of each image, in an order of its own.

    Args:
        images: Levels from 0 to 1, shape (N, 3, H, W), any device.
        generator: On the CPU; six draws for each image.
        strength: 1 multiplies each of the three by a factor between 0.5 and 1.5; 0 changes nothing.
        share: As in `shift_and_mirror`.

    Returns:
        New levels from 0 to 1.

    Source: Howard (2013), Some Improvements on Deep CNN Based Image Classification, section 2.2.
    """
    total = len(images) if share is None else share.total
    factors = 1 + strength * DISTORTION * (2 * torch.rand(3, total, generator=generator) - 1)
    order = torch.rand(3, total, generator=generator).argsort(0)
    if share is not None:
        factors, order = share.take(factors, 1), share.take(order, 1)
    factors, order = factors.to(images), order.to(images.device)
    weights = torch.tensor(GREY, device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    for turn in range(3):
        which = order[turn].view(-1, 1, 1, 1)
        grey = (images * weights).sum(1, keepdim=True)
        # Each of the three moves the image away from, or towards, something flatter than it.
        flat = torch.where(which == 0, torch.zeros_like(grey), grey)
        flat = torch.where(which == 1, grey.mean((2, 3), keepdim=True), flat)
        factor = factors.gather(0, order[turn][None])[0].view(-1, 1, 1, 1)
        images = (flat + factor * (images - flat)).clamp(0, 1)
    return images


def crop_batch(levels: Tensor, crop: Crop, size: int) -> Tensor:
    """The same crop of every image, resized bilinearly.

    Args:
        levels: Shape (N, 3, H, W), floating point, any device.
        crop: In their pixels. For enlarging, or reducing by less than two: nothing is averaged.
        size: Side of the result, pixels.

    Returns:
        Shape (N, 3, size, size).
    """
    return crop_each(levels, [crop.box] * len(levels), [crop.mirrored] * len(levels), size)


def crop_each(levels: Tensor, boxes: Sequence[Box], mirrored: Sequence[bool], size: int) -> Tensor:
    """A crop of its own for each image; see `crop_batch`."""
    left, top, across, down = torch.tensor(boxes, dtype=levels.dtype, device=levels.device).T[..., None]
    height, width = levels.shape[-2:]
    places = (torch.arange(size, device=levels.device, dtype=levels.dtype) + 0.5) / size
    flip = torch.tensor(mirrored, device=levels.device)[:, None]
    # grid_sample has the picture from -1 to 1.
    x = 2 * (left + across * torch.where(flip, 1 - places, places)) / width - 1
    y = 2 * (top + down * places) / height - 1
    shape = (len(levels), size, size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], -1)
    return torch.nn.functional.grid_sample(levels, grid, padding_mode="border", align_corners=False)


def standardize(levels: Tensor) -> Tensor:
    """Levels from 0 to 1, shape (N, 3, H, W), with `MEAN` taken off and divided by `DEVIATION`."""
    mean, deviation = (
        torch.tensor(v, device=levels.device, dtype=levels.dtype).view(1, 3, 1, 1) for v in (MEAN, DEVIATION)
    )
    return (levels - mean) / deviation
