"""A layer that takes up maps before and behind it: which it can, and the layer that results."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.layers import BatchNormPerActivation, Normalization
from batchnorm.layers.scale_shift import ScaleShift
from batchnorm.surgery.graph import AFFINE

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Line = tuple[Tensor, Tensor]
"""Scale and shift, one for each feature, in float64 on the CPU."""


@dataclass(frozen=True)
class Taken:
    """What a layer has taken up beside what it computes.

    Attributes:
        ahead: The map of its input features, done first.
        behind: The map of its output features, done last.
    """

    ahead: Line | None = None
    behind: Line | None = None

    def also(self, side: str, line: Line) -> "Taken":
        """With one more map, outermost on its side."""
        if side == "ahead":
            return Taken(line if self.ahead is None else joined(line, self.ahead), self.behind)
        return Taken(self.ahead, line if self.behind is None else joined(self.behind, line))


def joined(first: Line, second: Line) -> Line:
    """One map and after it another."""
    return first[0] * second[0], first[1] * second[0] + second[1]


def line_of(norm: nn.Module) -> Line:
    """The fixed map y = scale · x + shift of a normalization, a scale and a shift for each feature."""
    scale = (norm.running_var.to("cpu", torch.float64) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to("cpu", torch.float64)
    shift = -norm.running_mean.to("cpu", torch.float64) * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().to("cpu", torch.float64)


def feature_dims(layer: nn.Module, num_dims: int) -> list[int]:
    """The dimensions along which the maps that a layer takes up may vary.

    Args:
        layer: Affine or a normalization.
        num_dims: Of its input, and its output.
    """
    if isinstance(layer, BatchNormPerActivation):
        return list(range(1, num_dims))
    if isinstance(layer, Normalization):
        return [layer.channel_dim % num_dims]
    if isinstance(layer, nn.Linear):
        return [num_dims - 1]
    if isinstance(layer, AFFINE):
        return [num_dims - (layer.weight.dim() - 1)]
    return [1]


def border_obstacle(layer: nn.Module, name: str) -> str:
    """Why a layer cannot take up a map ahead of it: what it sees beyond its input; empty if it can."""
    if isinstance(layer, TRANSPOSED):
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        inside = all(p >= r for p, r in zip(layer.padding, reach, strict=True))
        if inside and set(layer.stride) == {1} and not any(layer.output_padding):
            return ""
        return f"the shift would reach the outputs of {name} ({type(layer).__name__}) in unequal numbers"
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros" or not any(pads_of(layer)):
        return ""
    return (
        f"{name} pads with zeros, which the map would shift; a multiply-add costs less than to pad with "
        f"-shift/scale in place of them"
    )


def pads_of(layer: nn.Module) -> tuple[int, ...]:
    """How far a convolution pads on each side."""
    return tuple(layer._reversed_padding_repeated_twice)


def fold_pair(affine: nn.Module, norm: nn.Module) -> nn.Module:
    """A layer that computes ``norm(affine(x))`` with the running statistics fixed.

    Args:
        affine: Convolution, transposed convolution or linear layer; not changed.
        norm: Over the output channels of ``affine``, with running statistics.

    Returns:
        As `absorbed`. An activation that ``norm`` carries is not part of it.
    """
    return absorbed(affine, Taken(behind=line_of(norm)))


@torch.no_grad()
def absorbed(layer: nn.Module, taken: Taken) -> nn.Module:
    """A copy of an affine layer that does what it has taken up too.

    Args:
        layer: Convolution, transposed convolution or linear layer; not changed.
        taken: Its maps, one entry a channel.

    Returns:
        The copy; weight and bias computed in float64 and rounded once.
    """
    weight = layer.weight.to("cpu", torch.float64)
    ins, outs = channels_of(layer)
    bias = torch.zeros(int(outs.max()) + 1, dtype=torch.float64)
    if layer.bias is not None:
        bias = bias + layer.bias.to("cpu", torch.float64)
    if taken.ahead is not None:
        scale, shift = taken.ahead
        reached = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
        bias = bias.index_add(0, outs.flatten(), (reached * shift[ins]).flatten())
        weight = weight * _over(scale[ins], weight)
    if taken.behind is not None:
        scale, shift = taken.behind
        weight, bias = weight * _over(scale[outs], weight), bias * scale + shift
    made = copy.deepcopy(layer)
    made.weight.copy_(weight)
    made.bias = nn.Parameter(bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
    return made


def channels_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The input and the output channel of each entry of a weight, shape of its first two dimensions."""
    first, second = layer.weight.shape[:2]
    groups = getattr(layer, "groups", 1)
    # Groups divide the first dimension; within one, the second counts from the group's start.
    ones = torch.arange(first)[:, None].expand(first, second)
    others = ones // (first // groups) * second + torch.arange(second)
    return (ones, others) if isinstance(layer, TRANSPOSED) else (others, ones)


def _over(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.view(*scale.shape, *[1] * (weight.dim() - 2))


@torch.no_grad()
def multiply_add(norm: nn.Module, line: Line, *, bare: bool = False) -> ScaleShift:
    """What computes a normalization's map, and carries on what the layer carried.

    Args:
        norm: Not changed.
        line: What there is to compute.
        bare: Without the activation that the layer carries.
    """
    like = norm.running_mean
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    scale, shift = (t.to(like.device, dtype) for t in line)
    trains = norm.weight is not None and norm.weight.requires_grad
    ours = norm if isinstance(norm, Normalization) else None
    made = ScaleShift(
        scale,
        shift,
        channel_dim=1 if ours is None else ours.channel_dim,
        activation=None if bare or ours is None else ours.activation,
        trains=trains,
    )
    return made.train(norm.training)


def fan_in(layer: nn.Module) -> int:
    """How many terms make up one output of an affine layer, at most."""
    _, outs = channels_of(layer)
    return math.prod(layer.weight.shape) // (int(outs.max()) + 1)
