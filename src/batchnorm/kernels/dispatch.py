"""Which kernel runs: the fastest that can, or the one that was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import cast

import torch
from torch import Tensor

from batchnorm.kernels import cpu, gpu, native, reference
from batchnorm.kernels.contract import Kernel
from batchnorm.kernels.cpu_threads import LOG

KERNELS: dict[str, Kernel] = {
    "reference": cast(Kernel, reference),
    "torch": cast(Kernel, native),
    "cpu": cast(Kernel, cpu),
    "gpu": cast(Kernel, gpu),
}
"""By the name that `use` takes."""

FEW_ELEMENTS = 32768
"""Up to as many, on a CPU, PyTorch's operations are faster than fused kernels: a call of them costs less."""

_asked: ContextVar[str] = ContextVar("batchnorm.kernels.use", default="auto")


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run every batch normalization inside the context by one kernel.

    Args:
        name: "reference" (plain tensor operations, in the order of the paper), "torch" (PyTorch's
            own kernel), "cpu" (numba), "gpu" (Triton), or "auto", which chooses by device, dtype
            and layout. A kernel that cannot run on what it is given raises ``ValueError`` with
            the reason; "auto" takes another and logs the reason once, to the logger "batchnorm".

    The choice holds for the calling thread, and is made as a forward runs: its backward is the
    same kernel's. Code under `torch.compile` keeps what it was compiled with. Under function
    transforms (`torch.func`, forward-mode differentiation) the reference always runs.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in (*KERNELS, "auto"):
        known = ", ".join(repr(k) for k in (*KERNELS, "auto"))
        raise ValueError(f"unknown kernel {name!r}: use one of {known}")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def choose(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> Kernel:
    """The kernel for a call.

    Raises:
        ValueError: A kernel was asked for by name and cannot run; the message says why.
    """
    asked = _asked.get()
    if asked != "auto":
        reason = KERNELS[asked].refuses(x, gamma, beta, residual, mask, activation)
        if reason:
            raise ValueError(
                f"kernel {asked!r} was asked for and cannot run: {reason}; ask for another, or for 'auto'"
            )
        return KERNELS[asked]
    fast = KERNELS["cpu" if x.is_cpu else "gpu"]
    reason = fast.refuses(x, gamma, beta, residual, mask, activation)
    if not reason and fast is cpu and mask is None:
        reason = cpu.yields(x, residual)
    if not reason:
        return fast
    if x.device.type in ("cpu", "cuda"):
        _say(reason)
    return KERNELS["torch" if mask is None else "reference"]


def is_automatic() -> bool:
    """Whether no kernel was asked for by name."""
    return _asked.get() == "auto"


@cache
def _say(reason: str) -> None:
    LOG.info("a batch normalization falls back to PyTorch's own operations: %s", reason)


_PLAIN = (Tensor, torch.nn.Parameter)

# Looked up once: `runs_eagerly` is asked before every layer, and a small layer takes microseconds.
_is_compiling = torch.compiler.is_compiling
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state
_functorch_is_active = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors in plain eager execution, which kernels may read by address.

    Not so under `torch.compile`, function transforms, forward-mode differentiation, tracing, and
    dispatch modes, nor for subclasses (fake, distributed): all these want to see operations.
    """
    if (
        _is_compiling()
        or _functorch_is_active()
        or _forward_ad._current_level >= 0
        or _num_dispatch_modes()
        or _tracing_state() is not None
    ):
        return False
    for t in tensors:  # noqa: SIM110, a generator costs more than all else here
        # A lazily negated view, as the imaginary part of a conjugate, has other numbers in memory.
        if t is not None and (type(t) not in _PLAIN or t.is_neg()):
            return False
    return True


def is_transformed() -> bool:
    """Whether a function transform (`torch.func`) or forward-mode differentiation is on."""
    if _is_compiling():
        return False
    return _functorch_is_active() or _forward_ad._current_level >= 0
