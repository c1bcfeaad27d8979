"""Batch normalization on the GPU: the functions of `contract.Kernel` on Triton kernels.

Training reads x once where a channel is short enough for one program, else twice; backward
likewise with dy and x. A residual and the activation ride along, and nothing is waited for:
the count of a mask stays on the device. Results repeat bit for bit on the same chip.

Triton is imported with the first launch. It comes with PyTorch's CUDA builds; under its
interpreter (``TRITON_INTERPRET=1``, set before Triton is imported) the kernels take CPU tensors.
"""

import os
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from batchnorm.kernels.contract import Gradients
from batchnorm.kernels.gpu_plan import Plan, plan
from batchnorm.moments import Moments

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NUM_WARPS = 8
INTERPRETED_PROCESSORS = 4
"""Multiprocessors that the interpreter plays."""


def refuses(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> str:
    """Why this kernel cannot run on such tensors; empty if it can. Looks at no value."""
    if not x.is_cuda and not (x.device.type == "cpu" and _interpreter_wanted()):
        return f"it runs on CUDA devices, and the input is on {x.device}"
    if not _has_triton():
        return "Triton is not installed (it comes with PyTorch's CUDA builds, or: pip install triton)"
    if x.dtype not in DTYPES:
        return f"it has no kernel for {x.dtype}"
    if activation not in _kernels().KNOWN:
        return f"it has no activation {activation!r}"
    if x.numel() == 0:
        return "an empty input leaves nothing to launch"
    for name, tensor in (("weight", gamma), ("bias", beta), ("residual", residual), ("mask", mask)):
        if tensor is not None and tensor.device != x.device:
            return f"the input is on {x.device} and its {name} on {tensor.device}"
    return ""


def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Moments]:
    """``y`` in the dtype and layout of ``x``, and the batch's biased moments."""
    job = _Job(x, mask, eps)
    y, mean, var = job.output(), job.vector(), job.vector()
    partial = job.partial(3)
    inputs = (job.x, job.laid_out(residual), job.mask, gamma, beta)
    job.launch("reduce_forward", *inputs, y, mean, var, partial, ACTIVATION=activation)
    if partial is not None:
        job.merge("merge_forward", partial, mean, var)
        job.launch("normalize", *inputs, y, mean, var, ACTIVATION=activation)
    count = x.numel() // x.shape[1] if mask is None else mask.sum()
    return job.like_x(y), Moments(mean, var, count)


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
    """Gradients through the moments of the batch, which are those that `forward` gave."""
    count = None if mask is None else moments.count
    return _backward(dy, x, y, gamma, beta, residual, mask, count, moments.mean, moments.var, eps, activation)


def moments(x: Tensor, mask: Tensor | None) -> Moments:
    """See `contract.Kernel.moments`; by plain operations."""
    return Moments.of(x, mask=mask)


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
    """``y`` by given statistics, as in evaluation or when frozen."""
    job = _Job(x, mask, eps)
    y = job.output()
    inputs = (job.x, job.laid_out(residual), job.mask, gamma, beta)
    job.launch("normalize", *inputs, y, mean, var, ACTIVATION=activation)
    return job.like_x(y)


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
    """Gradients of `apply`, with the statistics held constant."""
    return _backward(dy, x, y, gamma, beta, residual, mask, None, mean, var, eps, activation, given=True)


def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    count: Tensor | int | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    given: bool = False,
) -> Gradients:
    job = _Job(x, mask, eps)
    has_residual = y is not None or residual is not None
    upstream = job.laid_out(dy)
    y, residual = job.laid_out(y), job.laid_out(residual)
    dx, dgamma, dbeta = job.output(), job.vector(), job.vector()
    # Without activation and mask the residual's gradient is dy itself.
    dz = job.output() if has_residual and (activation != "identity" or mask is not None) else None
    partial = job.partial(2)
    affine = (gamma, beta, mean, var)
    job.launch(
        "reduce_backward",
        *(upstream, job.x, y, residual, job.mask, count, *affine, dx, dz, dgamma, dbeta, partial),
        ACTIVATION=activation,
        GIVEN=given,
    )
    if partial is not None:
        job.merge("merge_backward", partial, var, dgamma, dbeta, EPS=eps)
    if partial is not None and not given:
        # Where dz is in memory, reading it spares reading the residual again.
        inputs = (upstream, job.x, y, residual) if dz is None else (dz, job.x, None, None)
        job.launch(
            "input_gradient",
            *(*inputs, job.mask, count, *affine, dx, dgamma, dbeta),
            ACTIVATION=activation if dz is None else "identity",
        )
    if has_residual:
        dz = dy.to(x.dtype) if dz is None else job.like_x(dz)
    return job.like_x(dx), dgamma, dbeta, dz


class _Job:
    """One tensor, its cut, and the launches on it."""

    def __init__(self, x: Tensor, mask: Tensor | None, eps: float) -> None:
        self._asked = x
        num_c = x.shape[1]
        # Features last, as channels-last memory has them, unless that is the same as contiguous.
        self._rows = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
        self.x = x if self._rows else x.contiguous()
        num_s = 1 if self._rows else x[0, 0].numel()
        num_n = x.numel() // (num_c * num_s)
        self.mask = None if mask is None else mask.contiguous().view(torch.uint8)
        self._num_c = num_c
        self._wide_dtype = torch.promote_types(x.dtype, torch.float32)
        self._cut = plan(num_n, num_c, num_s, _num_processors(x.device))
        self._arguments: dict[str, Any] = _launch_arguments(self._cut, num_n, num_c, num_s, x.dtype, eps)

    def laid_out(self, t: Tensor | None) -> Tensor | None:
        """``t`` with its values in memory in the order of x's."""
        if t is None or not self._rows:
            return t if t is None else t.contiguous()
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    def output(self) -> Tensor:
        return torch.empty_like(self.x)

    def vector(self) -> Tensor:
        return torch.empty(self._num_c, dtype=self._wide_dtype, device=self.x.device)

    def partial(self, num_values: int) -> Tensor | None:
        """Room for what each split finds of each channel; ``None`` where there is one split."""
        if self._cut.num_splits == 1:
            return None
        shape = (self._cut.num_splits, num_values, self._num_c)
        return torch.empty(shape, dtype=self._wide_dtype, device=self.x.device)

    def like_x(self, t: Tensor) -> Tensor:
        """``t`` in the layout of the tensor that came in."""
        return t if self.x is self._asked else torch.empty_like(self._asked).copy_(t)

    def launch(self, kernel: str, *tensors: Tensor | int | None, **constants: Any) -> None:
        """Launch a kernel over all tiles: one program for each block of channels and split."""
        cut = self._cut
        arguments = self._arguments
        if kernel in ("normalize", "input_gradient"):
            # Nothing is summed: a program for each tile.
            arguments = arguments | {"tiles_per_split": 1}
            programs = cut.num_blocks * cut.num_tiles
        else:
            programs = cut.num_blocks * cut.num_splits
        self._run(kernel, programs, *tensors, **arguments, **constants)

    def merge(self, kernel: str, *tensors: Tensor, **constants: Any) -> None:
        """Launch a kernel that merges the splits of each channel."""
        splits = 1 << (self._cut.num_splits - 1).bit_length()
        channels = max(1, 4096 // splits)
        sizes = {"C": self._num_c, "num_splits": self._cut.num_splits}
        programs = -(-self._num_c // channels)
        self._run(kernel, programs, *tensors, **sizes, SPLITS=splits, CHANNELS=channels, **constants)

    def _run(self, kernel: str, programs: int, *args: Any, **kwargs: Any) -> None:
        run = getattr(_kernels(), kernel)[(programs,)]
        # Kernels step through vectors of channels one by one; a caller's may be expanded or strided.
        args = tuple(a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in args)
        if self.x.is_cuda:
            with torch.cuda.device(self.x.device):
                run(*args, **kwargs, num_warps=NUM_WARPS)
        else:
            run(*args, **kwargs)


def _launch_arguments(
    cut: Plan, num_n: int, num_c: int, num_s: int, dtype: torch.dtype, eps: float
) -> dict[str, Any]:
    import triton.language as tl

    return {
        "N": num_n,
        "C": num_c,
        # S = runs · ALIGN tells the compiler which powers of two divide S, so that loads are wide.
        "runs": num_s // cut.align,
        "ALIGN": cut.align,
        "tiles_s": cut.tiles_s,
        "num_tiles": cut.num_tiles,
        "tiles_per_split": cut.tiles_per_split,
        "BLOCK_N": cut.block_n,
        "BLOCK_C": cut.block_c,
        "BLOCK_S": cut.block_s,
        "INDEX": tl.int64 if cut.wide else tl.int32,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        # A constant, because a float argument would arrive as float32 in float64 kernels too.
        "EPS": eps,
    }


@cache
def _kernels() -> SimpleNamespace:
    from batchnorm.kernels import gpu_activations, gpu_backward, gpu_forward

    return SimpleNamespace(
        KNOWN=gpu_activations.KNOWN,
        reduce_forward=gpu_forward.reduce_forward,
        merge_forward=gpu_forward.merge_forward,
        normalize=gpu_forward.normalize,
        reduce_backward=gpu_backward.reduce_backward,
        merge_backward=gpu_backward.merge_backward,
        input_gradient=gpu_backward.input_gradient,
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "y", "on")


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
