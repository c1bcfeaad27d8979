"""One affine layer and the normalization behind it as one affine layer, and the proof of it."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.layers import Normalization


@dataclass(frozen=True)
class FoldProof:
    """How closely a folded layer agrees with the pair it replaces, on demanding inputs.

    Differences are relative to the sum of the absolute values of the terms that make up an
    output, which is what rounding scales with when they cancel.

    Attributes:
        affine: Path of the convolution or linear layer.
        norm: Path of the normalization.
        exact: Largest difference when both are computed in float64.
        miss: Largest difference in the layer's own dtype.
        allowed: What rounding in that dtype explains.
    """

    affine: str
    norm: str
    exact: float
    miss: float
    allowed: float


@torch.no_grad()
def fold_pair(affine: nn.Module, norm: nn.Module) -> nn.Module:
    """A layer that computes ``norm(affine(x))`` with the running statistics fixed.

    Args:
        affine: ``Conv1d``, ``Conv2d``, ``Conv3d`` or ``Linear``; not changed.
        norm: Over the output channels of ``affine``, with running statistics.

    Returns:
        A copy of ``affine`` with other weight and bias, computed in float64 and rounded once. An
        activation that ``norm`` carries is not part of it.
    """
    scale, shift = _scale_and_shift(norm)
    weight = affine.weight.double() * scale.view(-1, *[1] * (affine.weight.dim() - 1))
    bias = shift if affine.bias is None else affine.bias.double() * scale + shift
    folded = copy.deepcopy(affine)
    folded.weight.copy_(weight)
    folded.bias = nn.Parameter(bias.to(affine.weight.dtype), requires_grad=affine.weight.requires_grad)
    return folded


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The fixed linear map y = scale · x + shift of a normalization, in float64, each of shape (C,)."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


@torch.no_grad()
def prove_pair(
    affine_path: str, norm_path: str, affine: nn.Module, norm: nn.Module, shape: tuple[int, ...]
) -> FoldProof | str:
    """Compare a pair with its fold on inputs with borders, large means and small variances.

    Args:
        affine_path: For the proof.
        norm_path: For the proof.
        affine: As in `fold_pair`.
        norm: As in `fold_pair`, in evaluation mode.
        shape: Of an input of ``affine``, with the batch first.

    Returns:
        The proof, or the reason why the pair must stay as it is.
    """
    norm = copy.deepcopy(norm)
    if isinstance(norm, Normalization):
        norm.activation = None
    folded = fold_pair(affine, norm)
    if not (folded.weight.isfinite().all() and folded.bias.isfinite().all()):
        return f"the folded weights overflow {affine.weight.dtype}"
    wide_affine, wide_norm = (copy.deepcopy(m).to("cpu", torch.float64) for m in (affine, norm))
    wide_folded = fold_pair(wide_affine, wide_norm)
    terms = _terms(wide_affine, wide_norm)
    exact = miss = 0.0
    roundoff = torch.finfo(affine.weight.dtype).eps
    fan_in = affine.weight[0].numel()
    # Convolutions may run in TF32, which would hide a wrong fold behind its own rounding.
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        for x in _demanding(_small(affine, shape), affine.weight):
            wide_x = x.to("cpu", torch.float64)
            scale = terms(wide_x.abs())
            exact = max(exact, _largest(wide_norm(wide_affine(wide_x)) - wide_folded(wide_x), scale))
            before = norm(affine(x))
            miss = max(
                miss, _largest((before - folded(x)).where(before.isfinite(), torch.zeros_like(before)), scale)
            )
    allowed = roundoff * (16 + fan_in**0.5)
    wide_allowed = torch.finfo(torch.float64).eps * (16 + fan_in**0.5)
    if not (exact <= wide_allowed and miss <= allowed):
        return (
            f"undone: folded, it differs by {exact:.1e} in float64 and {miss:.1e} in its own dtype "
            f"where rounding explains {wide_allowed:.1e} and {allowed:.1e}"
        )
    return FoldProof(affine_path, norm_path, exact, miss, allowed)


def _terms(affine: nn.Module, norm: nn.Module) -> nn.Module:
    """A layer that sums the absolute values of all terms, given the absolute values of an input."""
    scale, _ = _scale_and_shift(norm)
    terms = fold_pair(affine, norm)
    terms.weight.abs_()
    constant = norm.running_mean.abs() + (0 if affine.bias is None else affine.bias.abs())
    beta = 0 if norm.bias is None else norm.bias.abs()
    terms.bias.copy_(constant * scale.abs() + beta)
    return terms


def _small(affine: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as telling as ``shape`` and cheaper: two examples, all borders, a few positions inside."""
    if isinstance(affine, nn.Linear):
        return (2, *shape[1:])
    reach = [d * (k - 1) + 1 for d, k in zip(affine.dilation, affine.kernel_size, strict=True)]
    pads = affine.padding if isinstance(affine.padding, tuple) else reach
    sizes = [
        min(size, 2 * max(r, p + 1) + 3 * s)
        for size, r, p, s in zip(shape[2:], reach, pads, affine.stride, strict=True)
    ]
    return (2, shape[1], *sizes)


def _demanding(shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    border = torch.ones(shape, dtype=torch.float64)
    if len(shape) > 2:
        border[(slice(None), slice(None), *[slice(1, -1)] * (len(shape) - 2))] = 0
    # Half precision overflows where others only round.
    far = 30.0 if like.dtype == torch.float16 else 1e3
    return [t.to(like.device, like.dtype) for t in (noise, noise + far, noise * 1e-3, border)]


def _largest(difference: Tensor, scale: Tensor) -> float:
    wide = difference.to("cpu", torch.float64).abs()
    tiny = torch.finfo(torch.float64).tiny
    worst = (wide / scale.clamp(min=tiny)).max().item() if wide.numel() else 0.0
    return worst if worst == worst else float("inf")
