"""Images of another kind: noise, blur, little contrast, inverted, turned."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS: dict[str, dict[str, tuple[float, ...]]] = {
    "grey": {
        "noise": (0.2, 0.4, 0.6),
        "blur": (1.0, 1.5, 2.5),
        "contrast": (0.5, 0.3, 0.15),
        "inversion": (1.0,),
        "rotation": (20.0, 40.0),
    },
    "colour": {"noise": (0.05, 0.1, 0.2), "blur": (0.6, 1.0, 1.6), "contrast": (0.5, 0.3, 0.15)},
}
"""By kind: deviation of the noise and of the blur's Gaussian (in pixels), share of the contrast that is left,
whether inverted, degrees."""

_PART = 1000


def corrupted(images: Tensor, kind: str, strength: float, seed: int) -> Tensor:
    """Images in 0 to 1, shape (N, C, H, W), in another domain; the same ones for the same seed."""
    return _KINDS[kind](images, strength, torch.Generator().manual_seed(seed))


def _noise(x: Tensor, deviation: float, random: torch.Generator) -> Tensor:
    """Gaussian, cut off at black and white as a camera does."""
    return torch.randn(x.shape, generator=random).mul_(deviation).add_(x).clamp_(0, 1)


def _blur(x: Tensor, deviation: float, _: torch.Generator) -> Tensor:
    """A Gaussian over three deviations to each side; borders are continued."""
    reach = math.ceil(3 * deviation)
    taps = torch.arange(-reach, reach + 1) / deviation
    weights = torch.exp(-taps.square() / 2)
    weights /= weights.sum()
    row, column = (
        weights.view(shape).expand(x.shape[1], 1, -1, -1) for shape in ((1, 1, 1, -1), (1, 1, -1, 1))
    )
    # In parts: a convolution pads three channels to sixteen, which takes gigabytes for all images at once.
    parts = (F.pad(part, (reach,) * 4, mode="replicate") for part in x.split(_PART))
    return torch.cat([F.conv2d(F.conv2d(p, row, groups=len(row)), column, groups=len(row)) for p in parts])


def _contrast(x: Tensor, share: float, _: torch.Generator) -> Tensor:
    """Drawn towards each image's mean."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + share * (x - mean)


def _inversion(x: Tensor, _: float, __: torch.Generator) -> Tensor:
    return 1 - x


def _rotation(x: Tensor, degrees: float, random: torch.Generator) -> Tensor:
    """About the middle, one way or the other by chance; bilinear, and black from outside."""
    angle = math.radians(degrees) * (2.0 * torch.randint(2, (len(x),), generator=random) - 1)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(len(x))
    maps = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


_KINDS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "inversion": _inversion,
    "rotation": _rotation,
}
