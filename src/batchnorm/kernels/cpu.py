"""The CPU's kernels: BN, addition and activation in one pass, by numba on torch's threads.

Implements `contract.Kernel`. float32 and bfloat16 are computed in float32, float64 in float64;
contiguous tensors channel by channel (`cpu_planes`), channels-last ones and features row by row
(`cpu_rows`); any other layout is copied first. The same input gives the same bits at a given
number of threads.
"""

from functools import cache
from importlib.util import find_spec
from typing import overload

import torch
from torch import Tensor

from batchnorm.kernels.contract import Gradients
from batchnorm.kernels.cpu_build import Spec, compiled
from batchnorm.kernels.cpu_plan import KINDS, LINE, Plan, pitch, plan
from batchnorm.kernels.cpu_threads import APPLY, MERGE, PACK, PARTIAL, PREPARE, Compiled, num_threads, run
from batchnorm.kernels.heap import is_kept
from batchnorm.moments import Moments

FOUND = find_spec("numba") is not None
"""Whether these kernels have what they need."""


def missing() -> str:
    """What these kernels lack on this machine; empty if nothing."""
    return "" if FOUND else "numba is not installed"


def refuses(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> str:
    """Why these kernels cannot run on such tensors; empty if they can."""
    if not x.is_cpu:
        return f"they run on the CPU, and the input is on {x.device}"
    if x.dtype not in KINDS:
        return f"they take float32, float64 and bfloat16, and the input is {x.dtype}"
    for name, tensor in (("weight", gamma), ("bias", beta), ("residual", residual), ("mask", mask)):
        if tensor is not None and not tensor.is_cpu:
            return f"the input is on the CPU and its {name} on {tensor.device}"
    return missing()


def yields(x: Tensor, residual: Tensor | None) -> str:
    """Why PyTorch's own kernel is the better choice although these could run; empty if it is not."""
    # Runs of less than two cache lines, in thousands of channels: nothing is read ahead.
    short = x.dim() > 2 and x.dtype == torch.bfloat16 and residual is not None
    if short and x.numel() >= _MANY and x.shape[2:].numel() < _SHORT_RUN and x.is_contiguous():
        return f"bfloat16 with a residual in short runs, shape {tuple(x.shape)}, is faster there"
    return ""


_MANY, _SHORT_RUN = 2**21, 64


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
    chosen = _plan("forward", x, activation, residual is not None, mask is not None)
    if chosen is None:
        y, moments = forward(x.contiguous(), gamma, beta, residual, mask, eps, activation)
        return _laid_out_as(x, y), moments
    C, wide = chosen.num_channels, chosen.wide
    mean, var = x.new_empty(C, dtype=wide), x.new_empty(C, dtype=wide)
    count = None if mask is None else x.new_empty((), dtype=torch.int64)
    y = _transform(chosen, x, mean, var, count, gamma, beta, residual, mask, eps)
    return y, Moments(mean, var, x.numel() // C if count is None else count)


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    """See `contract.Kernel.moments`: the phases of `forward` that come before its results."""
    chosen = _plan("forward", x, "identity", False, mask is not None)
    if chosen is None:
        return moments(x.contiguous(), mask)
    C, wide = chosen.num_channels, chosen.wide
    mean, var = x.new_empty(C, dtype=wide), x.new_empty(C, dtype=wide)
    count = None if mask is None else x.new_empty((), dtype=torch.int64)
    _transform(chosen, x, mean, var, count, None, None, None, mask, 0.0, PARTIAL | MERGE)
    return Moments(mean, var, x.numel() // C if count is None else count)


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
    chosen = _plan("apply", x, activation, residual is not None, mask is not None)
    if chosen is None:
        y = apply(x.contiguous(), mean, var, gamma, beta, residual, mask, eps, activation)
        return _laid_out_as(x, y)
    mean, var = _vector(mean, chosen.wide), _vector(var, chosen.wide)
    return _transform(chosen, x, mean, var, None, gamma, beta, residual, mask, eps)


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
    given = (gamma, beta, residual, mask, eps, activation)
    return _gradients("backward", dy, x, y, moments.mean, moments.var, moments.count, *given)


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
    given = (gamma, beta, residual, mask, eps, activation)
    return _gradients("apply_backward", dy, x, y, mean, var, 0, *given)


def move(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | None,
    *,
    inverted_with: float | None = None,
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
        inverted_with: If given, ``var`` holds 1/sqrt(var + this), as PyTorch hands it out.
    """
    inverted, eps = (0, 0.0) if inverted_with is None else (1, inverted_with)
    block = PACK(
        0, 1, inverted, count, mean.numel(), 1, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        mean.data_ptr(), var.data_ptr(), 0, 0, eps, -1.0 if momentum is None else momentum, 0, 0, 0, 0, 0,
        running_mean.data_ptr(), running_var.data_ptr(), num_batches_tracked.data_ptr(),
    )  # fmt: skip
    run(_mover(mean.dtype), block, 1)
    _count_change((running_mean, running_var, num_batches_tracked))


# What `torch.autograd.graph.increment_version` calls, which takes longer than moving a hundred channels.
_count_change = torch._C._increment_version


@cache
def _mover(dtype: torch.dtype) -> Compiled:
    return compiled(Spec("running", "move", KINDS[dtype], ()))


def _plan(function: str, x: Tensor, activation: str, has_residual: bool, has_mask: bool) -> Plan | None:
    return plan(function, x.shape, x.stride(), x.dtype, activation, has_residual, has_mask, num_threads())


def _transform(
    chosen: Plan,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    phases: int = PARTIAL | MERGE | PREPARE | APPLY,
) -> Tensor:
    kernel, steps, sizes, _, wide, num_scratch, streams = chosen
    residual, mask = _like(residual, x), None if mask is None else mask.contiguous()
    gamma, beta = _vector(gamma, wide), _vector(beta, wide)
    y = torch.empty_like(x) if phases & APPLY else x.new_empty(0)
    scratch = x.new_empty(num_scratch, dtype=torch.float64)
    streams = streams and is_kept() and y.data_ptr() % LINE == 0
    for planned, threads in steps:
        if not planned & phases:
            continue
        block = PACK(
            planned & phases, *sizes, streams, 0, x.data_ptr(), y.data_ptr(), _at(residual), _at(mask),
            _at(gamma), _at(beta), mean.data_ptr(), var.data_ptr(), _at(count), scratch.data_ptr(),
            eps, 0.0, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip
        run(kernel, block, threads)
    return y


def _gradients(
    function: str,
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | int,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> Gradients:
    # The field of the residual holds y where that is what the slope is taken from.
    extra = residual if y is None else y
    if extra is not None and activation == "identity":
        fused = (gamma, beta, None, mask, eps, activation)
        dx, dgamma, dbeta, _ = _gradients(function, dy, x, None, mean, var, count, *fused)
        masked = dy if mask is None else torch.where(mask.unsqueeze(1), dy, 0)
        return dx, dgamma, dbeta, _laid_out_as(x, masked)
    chosen = _plan(function, x, activation, extra is not None, mask is not None)
    if chosen is None:
        given = (mean, var, count, gamma, beta, residual, mask, eps, activation)
        dx, dgamma, dbeta, dresidual = _gradients(function, dy, x.contiguous(), y, *given)
        dresidual = None if dresidual is None else _laid_out_as(x, dresidual)
        return _laid_out_as(x, dx), dgamma, dbeta, dresidual
    kernel, steps, sizes, C, wide, num_scratch, streams = chosen
    extra, mask = _like(extra, x), None if mask is None else mask.contiguous()
    apart = pitch(x.shape, x.stride(), dy.stride())
    if apart is None or dy.dtype != x.dtype or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
        apart = pitch(x.shape, x.stride(), x.stride())
    mean, var = _vector(mean, wide), _vector(var, wide)
    gamma, beta = _vector(gamma, wide), _vector(beta, wide)
    dx, dz = torch.empty_like(x), None if extra is None else torch.empty_like(x)
    dgamma, dbeta = x.new_empty(C, dtype=wide), x.new_empty(C, dtype=wide)
    scratch = x.new_empty(num_scratch, dtype=torch.float64)
    counted = count.data_ptr() if isinstance(count, Tensor) else 0
    streams = streams and is_kept() and dx.data_ptr() % LINE == 0
    for phases, threads in steps:
        block = PACK(
            phases, *sizes, streams, apart, x.data_ptr(), 0, _at(extra), _at(mask),
            _at(gamma), _at(beta), mean.data_ptr(), var.data_ptr(), counted, scratch.data_ptr(),
            eps, 0.0, dy.data_ptr(), dx.data_ptr(), _at(dz), dgamma.data_ptr(), dbeta.data_ptr(), 0, 0, 0,
        )  # fmt: skip
        run(kernel, block, threads)
    return dx, dgamma, dbeta, dz


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
    """``t`` as the kernel reads it: lying like ``x``, of its dtype, and not a lazily negated view."""
    if t is None or (t.dtype == x.dtype and t.stride() == x.stride() and not t.is_neg()):
        return t
    return torch.empty_like(x).copy_(t)


def _laid_out_as(x: Tensor, t: Tensor) -> Tensor:
    if t.stride() == x.stride():
        return t
    kept = torch.empty_like(x)
    return t if kept.stride() == t.stride() else kept.copy_(t)


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
