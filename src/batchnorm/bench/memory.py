"""What a training step of BN-Inception holds in memory, form by form, each in a process of its own."""

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.bench.step import in_place
from batchnorm.models.inception import inception
from batchnorm.surgery import accelerate

FORMS = (
    "eager",
    "eager, in-place ReLU",
    "batchnorm",
    "batchnorm, save_memory",
)
"""All in the layout of the run, channels last or contiguous."""


def measure(*, batch: int = 32, side: int = 224, layout: str = "channels_last") -> dict[str, Any]:
    """Resident memory of one training step, beyond model and batch.

    Args:
        batch: Images.
        side: Pixels.
        layout: "contiguous" or "channels_last".

    Returns:
        For each form, bytes held between forward and backward (the activations kept for
        backward), the peak of the whole step, and both relative to eager with in-place ReLU.

    Raises:
        OSError: The system does not tell a process its memory as Linux does.
        AttributeError: The C library is not glibc.
    """
    context = multiprocessing.get_context("spawn")
    bytes_of: dict[str, tuple[int, int]] = {}
    for form in FORMS:
        # A process each: memory that one form has used is not given back wholly to the next.
        with ProcessPoolExecutor(1, context) as process:
            bytes_of[form] = process.submit(_one, form, batch, side, layout).result()
    held, peak = bytes_of["eager, in-place ReLU"]
    return {
        "network": f"BN-Inception, batch {batch}, {side}×{side}, {layout}",
        "bytes": {form: {"held": h, "peak": p} for form, (h, p) in bytes_of.items()},
        "of_eager_in_place": {
            form: {"held": round(h / held, 3), "peak": round(p / peak, 3)}
            for form, (h, p) in bytes_of.items()
        },
    }


def _one(form: str, batch: int, side: int, layout: str) -> tuple[int, int]:
    net: Any = in_place(inception())
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 1000, (batch,))
    if layout == "channels_last":
        net, images = (
            net.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    if form == "eager":
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
    elif form != "eager, in-place ReLU":
        net, _ = accelerate(net, images[:2], save_memory=form.endswith("save_memory"), keep_memory=False)
    loss_of = _loss(net, images, labels)
    loss_of().backward()  # gradients, and whatever the libraries set up on first use
    _give_back()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    loss = loss_of()
    held = _resident("VmRSS") - before
    loss.backward()
    return held, _resident("VmHWM") - before


def _give_back() -> None:
    """Return freed memory to the system: reused, it would not be counted."""
    ctypes.CDLL(None).malloc_trim(0)


def _loss(net: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(net(images), labels)


def _resident(which: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not tell {which}")
