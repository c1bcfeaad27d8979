"""The CPU's kernels: BN, addition and activation in one pass, by numba on torch's threads.

Implements `contract.Kernel`. float32 and bfloat16 are computed in float32, float64 in float64;
contiguous tensors channel by channel (`cpu_planes`), channels-last ones and features row by row
(`cpu_rows`); any other layout is copied first. The same input gives the same bits at a given
number of threads.
"""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple, overload

import torch
from torch import Tensor

from batchnorm.kernels.contract import Gradients
from batchnorm.kernels.cpu_build import Spec, compiled
from batchnorm.kernels.cpu_threads import APPLY, MERGE, PACK, PARTIAL, PREPARE, num_threads, run
from batchnorm.moments import Moments

_KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16"}
_GRAIN = 16384  # elements that are worth a thread
_CHUNK, _TILE = 4096, 16384  # elements that are in a near cache still when they are looked at again
_MOST_ROWS = 256  # of a tile: its sums are float32
_WHOLE = PARTIAL | MERGE | PREPARE | APPLY


class _Layout(NamedTuple):
    """How a tensor lies: ``room`` "planes" as (N, C, S) or "rows" as (N, C) with S 1."""

    room: str
    N: int
    C: int
    S: int


@cache
def _missing() -> str:
    if find_spec("numba") is None:
        return "numba is not installed"
    return ""


def refuses(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> str:
    """Why these kernels cannot run on such tensors; empty if they can."""
    if x.device.type != "cpu":
        return f"they run on the CPU, and the input is on {x.device}"
    if x.dtype not in _KINDS:
        return f"they take float32, float64 and bfloat16, and the input is {x.dtype}"
    return _missing()


def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Moments]:
    """See `contract.Kernel.forward`."""
    given, (x, layout) = x, _dense(x)
    wide = _wide(x)
    mean, var = x.new_empty(layout.C, dtype=wide), x.new_empty(layout.C, dtype=wide)
    count = None if mask is None else x.new_empty((), dtype=torch.int64)
    y = _transform(x, layout, mean, var, count, gamma, beta, residual, mask, eps, activation, _WHOLE)
    y = _laid_out_as(given, y)
    return y, Moments(mean, var, layout.N * layout.S if count is None else count)


def apply(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """See `contract.Kernel.apply`."""
    given, (x, layout) = x, _dense(x)
    wide = _wide(x)
    mean, var = _vector(mean, wide), _vector(var, wide)
    phases = PREPARE | APPLY
    y = _transform(x, layout, mean, var, None, gamma, beta, residual, mask, eps, activation, phases)
    return _laid_out_as(given, y)


def _transform(
    x: Tensor,
    layout: _Layout,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    phases: int,
) -> Tensor:
    room, N, C, S = layout
    y, residual, mask = torch.empty_like(x), _like(residual, x), None if mask is None else mask.contiguous()
    gamma, beta = _vector(gamma, mean.dtype), _vector(beta, mean.dtype)
    kernel = compiled(Spec(room, "forward", _KINDS[x.dtype], _options(room, activation, residual, mask)))
    threads, splits, chunk = _plan(layout)
    scratch = x.new_empty((3 * splits + 5 + 3 * splits) * C, dtype=torch.float64)

    def block(phase: int) -> bytes:
        return PACK(
            phase, splits, 0, N, C, S, chunk, _at(x), _at(y), _at(residual), _at(mask), _at(gamma), _at(beta),
            _at(mean), _at(var), _at(count), _at(scratch), eps, 0.0, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip

    if threads == 1 or (room == "planes" and splits == 1):
        run(kernel, block(phases), threads)
        return y
    if phases & PARTIAL:
        run(kernel, block(PARTIAL), threads)
    run(kernel, block(phases & (MERGE | PREPARE)), 1)
    run(kernel, block(APPLY), threads)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    moments: Moments,
    eps: float,
    activation: str,
) -> Gradients:
    """See `contract.Kernel.backward`."""
    count = moments.count if isinstance(moments.count, Tensor) else None
    mean, var = moments.mean, moments.var
    return _gradients(dy, x, y, mean, var, count, gamma, beta, residual, mask, eps, activation, 0)


def apply_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Gradients:
    """See `contract.Kernel.apply_backward`."""
    return _gradients(dy, x, y, mean, var, None, gamma, beta, residual, mask, eps, activation, 1)


def _gradients(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
    given: int,
) -> Gradients:
    like, (x, layout) = x, _dense(x)
    room, N, C, S = layout
    wide = _wide(x)
    # The field of the residual holds y where that is what the slope is taken from.
    extra = _like(residual if y is None else y, x)
    dy, mask = _like(dy, x), None if mask is None else mask.contiguous()
    dresidual = None
    if extra is not None and activation == "identity":
        dresidual, extra = dy if mask is None else torch.where(mask.unsqueeze(1), dy, 0), None
    mean, var, gamma, beta = (
        _vector(mean, wide),
        _vector(var, wide),
        _vector(gamma, wide),
        _vector(beta, wide),
    )
    dx, dz = torch.empty_like(x), None if extra is None else torch.empty_like(x)
    dgamma, dbeta = x.new_empty(C, dtype=wide), x.new_empty(C, dtype=wide)
    kernel = compiled(Spec(room, "backward", _KINDS[x.dtype], _options(room, activation, extra, mask)))
    threads, splits, chunk = _plan(layout)
    scratch = x.new_empty((2 * splits + 5 + 2 * splits) * C, dtype=torch.float64)

    def block(phase: int) -> bytes:
        return PACK(
            phase, splits, given, N, C, S, chunk, _at(x), 0, _at(extra), _at(mask), _at(gamma), _at(beta),
            _at(mean), _at(var), _at(count), _at(scratch), eps, 0.0, _at(dy), _at(dx), _at(dz),
            _at(dgamma), _at(dbeta), 0, 0, 0,
        )  # fmt: skip

    if threads == 1 or (room == "planes" and splits == 1):
        run(kernel, block(_WHOLE), threads)
    else:
        run(kernel, block(PREPARE), 1)
        run(kernel, block(PARTIAL), threads)
        run(kernel, block(MERGE), 1)
        run(kernel, block(APPLY), threads)
    dresidual = dz if dresidual is None else dresidual
    return _laid_out_as(like, dx), dgamma, dbeta, None if dresidual is None else _laid_out_as(like, dresidual)


def move(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
) -> None:
    """Move running statistics towards the moments of a batch, in place, unless one is not finite.

    Args:
        running_mean: Shape (C,), contiguous, of the dtype of ``mean``; so is ``running_var``.
        running_var: Unbiased.
        num_batches_tracked: int64, shape (); counts the batches that moved them.
        mean: Shape (C,), float32 or float64, contiguous; so is ``var``.
        var: Biased.
        count: Samples per channel, at least 2.
        momentum: Weight of the batch; ``None`` averages all batches equally.
    """
    kernel = compiled(Spec("running", "move", _KINDS[mean.dtype], ()))
    weight = -1.0 if momentum is None else momentum
    block = PACK(
        0, 1, 0, count, mean.numel(), 1, 0, 0, 0, 0, 0, 0, 0, _at(mean), _at(var), 0, 0, 0.0, weight,
        0, 0, 0, 0, 0, _at(running_mean), _at(running_var), _at(num_batches_tracked),
    )  # fmt: skip
    run(kernel, block, 1)
    torch.autograd.graph.increment_version((running_mean, running_var, num_batches_tracked))


def _dense(x: Tensor) -> tuple[Tensor, _Layout]:
    """``x``, or a contiguous copy where it lies otherwise than the kernels know, and its layout."""
    N, C = x.shape[0], x.shape[1]
    S = x.numel() // (N * C)
    if not x.is_contiguous():
        if x.movedim(1, -1).is_contiguous():
            return x, _Layout("rows", N * S, C, 1)
        x = x.contiguous()
    if S > 1:
        return x, _Layout("planes", N, C, S)
    # A single channel is one run of numbers.
    return x, _Layout("planes", 1, 1, N) if C == 1 else _Layout("rows", N, C, 1)


def _plan(layout: _Layout) -> tuple[int, int, int]:
    """Threads, parts of the data whose sums are merged, and elements or rows between two looks at them."""
    room, N, C, S = layout
    threads = max(min(num_threads(), N * C * S // _GRAIN), 1)
    if room == "rows":
        return threads, threads, min(max(_TILE // C, 4), _MOST_ROWS)
    whole_channels = C % threads == 0 or 8 * threads <= C
    return threads, 1 if whole_channels else threads, S * (_CHUNK // S) if S < _CHUNK else _CHUNK


def _options(
    room: str, activation: str, residual: Tensor | None, mask: Tensor | None
) -> tuple[str | bool, ...]:
    # A mask hides whole rows, which are skipped; among planes it needs loops of its own.
    joined = residual is not None
    return (activation, joined) if room == "rows" else (activation, joined, mask is not None)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@overload
def _vector(v: Tensor, wide: torch.dtype) -> Tensor: ...
@overload
def _vector(v: Tensor | None, wide: torch.dtype) -> Tensor | None: ...
def _vector(v: Tensor | None, wide: torch.dtype) -> Tensor | None:
    return v if v is None or (v.dtype == wide and v.is_contiguous()) else v.to(wide).contiguous()


@overload
def _like(t: Tensor, x: Tensor) -> Tensor: ...
@overload
def _like(t: Tensor | None, x: Tensor) -> Tensor | None: ...
def _like(t: Tensor | None, x: Tensor) -> Tensor | None:
    if t is None or (t.dtype == x.dtype and t.stride() == x.stride()):
        return t
    return torch.empty_like(x).copy_(t)


def _laid_out_as(x: Tensor, t: Tensor) -> Tensor:
    if t.stride() == x.stride():
        return t
    kept = torch.empty_like(x)
    return t if kept.stride() == t.stride() else kept.copy_(t)


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
