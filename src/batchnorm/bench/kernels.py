"""Normalization, addition and activation, forward and backward: ours, PyTorch's, and the floor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.bench.shapes import Shape
from batchnorm.bench.timing import copy_time, in_turns
from batchnorm.kernels.dispatch import choose
from batchnorm.layers import BatchNorm1d, BatchNorm2d

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FUSIONS = ("relu", "residual")

# Tensors that must be read or written once: x, y; then dy, x, dx. A residual is read, its gradient written.
PASSES = {"relu": 5, "residual": 7}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    shape: Shape
    dtype: str
    layout: str
    fusion: str


@dataclass(frozen=True)
class _Work:
    """The tensors of a case; every contender gets the same."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor

    @classmethod
    def of(cls, case: Case) -> "_Work":
        def draw() -> Tensor:
            t = torch.randn(case.shape.full).to(DTYPES[case.dtype])
            return t.contiguous(memory_format=LAYOUTS[case.layout]) if t.dim() == 4 else t

        residual = draw().requires_grad_() if case.fusion == "residual" else None
        return cls(draw().requires_grad_(), residual, draw())

    def run(self, f: Callable[[Tensor, Tensor | None], Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
        """Output and gradients in x, γ, β and the residual."""
        inputs = [self.x, *parameters, *([] if self.residual is None else [self.residual])]
        y = f(self.x, self.residual)
        return [y, *torch.autograd.grad(y, inputs, self.dy)]


def measure(case: Case, *, rounds: int = 9, compiled: bool = True) -> dict[str, Any]:
    """Time one case, after checking the numbers.

    Args:
        case: What to time.
        rounds: Samples of each contender.
        compiled: Whether `torch.compile` takes part; it costs seconds of compilation.

    Returns:
        Case, milliseconds of each contender (median and quartiles), ratios of the rivals' medians
        to ours, and the floor's share of our time: of a layer's, with autograd, and of the bare
        kernel's. ``right`` is false where our numbers are not as exact as eager PyTorch's; ratios
        are then left out.
    """
    work, num_channels = _Work.of(case), case.shape.size[0]
    ours_kind, torch_kind = (
        (BatchNorm2d, nn.BatchNorm2d) if work.x.dim() == 4 else (BatchNorm1d, nn.BatchNorm1d)
    )
    ours, theirs = ours_kind(num_channels, activation="relu"), torch_kind(num_channels)

    def in_place(x: Tensor, residual: Tensor | None) -> Tensor:
        y = theirs(x)
        return F.relu(y if residual is None else y.add_(residual), inplace=True)

    def as_written(x: Tensor, residual: Tensor | None) -> Tensor:
        y = theirs(x)
        return F.relu(y if residual is None else y + residual)

    calls = {"batchnorm": ours, "eager, in place": in_place, "eager, as written": as_written}
    if compiled:
        torch.compiler.reset()
        calls["compile"] = torch.compile(as_written, dynamic=False)
    contenders: dict[str, Callable[[], object]] = {}
    for name, f in calls.items():
        layer = ours if name == "batchnorm" else theirs
        contenders[name] = _bound(work, f, [layer.weight, layer.bias])
    contenders["kernel alone"] = _kernel(work, ours)
    for name, fresh in (("copy, fresh memory", True), ("copy, reused memory", False)):
        contenders[name] = copy_time(case.shape.full, DTYPES[case.dtype], fresh=fresh)

    right = _right(work, ours, in_place, theirs)
    timings = in_turns(contenders, rounds=rounds)
    row: dict[str, Any] = {
        "network": case.shape.network,
        "shape": list(case.shape.full),
        "count": case.shape.count,
        "dtype": case.dtype,
        "layout": case.layout,
        "fusion": case.fusion,
        "right": right,
        "ms": {
            name: [round(1e3 * s, 5) for s in (t.median_s, t.low_s, t.high_s)] for name, t in timings.items()
        },
    }
    mine = timings["batchnorm"].median_s
    # A copy moves two tensors.
    fresh_s, reused_s = (
        timings[f"copy, {kind} memory"].median_s * PASSES[case.fusion] / 2 for kind in ("fresh", "reused")
    )
    row["floor_share"] = {
        "fresh": significant(fresh_s / mine),
        "reused": significant(reused_s / mine),
        "kernel, reused": significant(reused_s / timings["kernel alone"].median_s),
    }
    rivals = [name for name in calls if name != "batchnorm"]
    row["speed_up"] = {name: significant(timings[name].median_s / mine) for name in rivals} if right else {}
    return row


def _bound(work: _Work, f: Callable[..., Tensor], parameters: list[Tensor]) -> Callable[[], object]:
    return lambda: work.run(f, parameters)


def significant(ratio: float) -> float:
    """Four digits, however small: a tiny input beside other work may leave less than a thousandth."""
    return float(f"{ratio:.4g}")


def _kernel(work: _Work, layer: Any) -> Callable[[], object]:
    """Forward and backward of the kernel that the layer would choose, without autograd around it."""
    x, dy = work.x.detach(), work.dy
    residual = None if work.residual is None else work.residual.detach()
    affine = (layer.weight.detach(), layer.bias.detach())
    kernel = choose(x, *affine, residual, None, "relu")

    def run() -> object:
        y, moments = kernel.forward(x, *affine, residual, None, layer.eps, "relu")
        output = None if residual is None else y
        return kernel.backward(dy, x, output, *affine, None, None, moments, layer.eps, "relu")

    return run


def _right(work: _Work, ours: Any, eager: Callable[..., Tensor], theirs: Any) -> bool:
    """Whether each result of ours misses the float64 truth at most twice as far as eager's, and rounding."""

    def doubled(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double().requires_grad_()

    x, residual = work.x.detach().double().requires_grad_(), doubled(work.residual)
    weight, bias = (p.detach().double().requires_grad_() for p in (theirs.weight, theirs.bias))

    def before_relu(x: Tensor, residual: Tensor | None) -> Tensor:
        z = F.batch_norm(x, None, None, weight, bias, training=True)
        return z if residual is None else z + residual

    # Where z is 0 but for rounding, ReLU may take either side: such places get no gradient in the check.
    with torch.no_grad():
        unclear = before_relu(x, residual).abs() < 64 * torch.finfo(work.x.dtype).eps
        dy = work.dy.masked_fill(unclear, 0)
    checked = _Work(work.x, work.residual, dy)
    wide = _Work(x, residual, dy.double())
    exact = wide.run(lambda x, r: F.relu(before_relu(x, r)), [weight, bias])
    got = checked.run(ours, [ours.weight, ours.bias])
    rival = checked.run(eager, [theirs.weight, theirs.bias])
    # The gradients of γ and β are sums, of as many terms, which may cancel.
    term = dy.abs().max().item() * (dy.numel() / dy.shape[1]) ** 0.5
    return all(
        _close(*results, term if results[0].dim() == 1 else 0.0)
        for results in zip(got, rival, exact, strict=True)
    )


def _close(mine: Tensor, eager: Tensor, truth: Tensor, scale: float) -> bool:
    miss, eager_miss = ((t.double() - truth).abs().max().item() for t in (mine, eager))
    roundoff = 2.0**-22 + (0.0 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps)
    return miss <= 2 * eager_miss + roundoff * max(truth.abs().max().item(), scale) + 1e-30
