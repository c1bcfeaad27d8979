"""The kinds of normalization in training, forward and backward, beside the plain layer and torch.nn's."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.bench.timing import MemorySetting, Timing, process, synchronize
from batchnorm.functional import batch_norm, normalize_with
from batchnorm.layers import BatchNorm2d, BatchRenorm2d, GhostBatchNorm2d

SHAPES: tuple[tuple[int, int, int, int], ...] = (
    (256, 64, 16, 16),
    (256, 64, 8, 8),
    (128, 256, 8, 8),
    (64, 64, 56, 56),
    (256, 512, 1, 1),
)
"""Inputs, (N, C, H, W)."""

PLAIN, GHOST, RENORM = "plain", "ghost", "renorm"

CONTENDERS: Mapping[str, Callable[[int, int], Callable[[Tensor], Tensor]]] = {
    PLAIN: lambda channels, ghost_size: BatchNorm2d(channels),
    GHOST: lambda channels, ghost_size: GhostBatchNorm2d(channels, ghost_size=ghost_size),
    "loop over ghosts, torch.nn": lambda channels, size: _Loop(nn.BatchNorm2d(channels), size),
    "loop over ghosts, ours": lambda channels, size: _Loop(BatchNorm2d(channels), size),
    RENORM: lambda channels, ghost_size: BatchRenorm2d(channels, r_max=3.0, d_max=5.0),
    "torch.nn": lambda channels, ghost_size: nn.BatchNorm2d(channels),
}
"""By name, what makes a layer, of its channels and the examples in a virtual batch."""


class _Loop(nn.Module):
    """Virtual batches one after the other, as libraries have it."""

    def __init__(self, norm: nn.Module, ghost_size: int) -> None:
        super().__init__()
        self.norm, self.ghost_size = norm, ghost_size

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in x.split(self.ghost_size)])


def measure(
    *,
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    ghost_size: int = 32,
    layouts: Sequence[str] = ("contiguous",),
    memory: Sequence[MemorySetting] = ("default", "kept"),
    rounds: int = 21,
    threads: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time a training step of every kind of layer alone, in turns.

    Args:
        shapes: Inputs, (N, C, H, W), float32.
        ghost_size: Examples in a virtual batch.
        layouts: "contiguous" or "channels_last".
        memory: Where the CPU's memory comes from; each in a process of its own.
        rounds: Samples of each contender.
        threads: PyTorch's threads; 0 leaves its own choice.
        progress: Told what is going on.

    Returns:
        For each case, each as median and quartiles over rounds: milliseconds of a contender (``ms``),
        and its time over the plain layer's in the same round, by the clock (``ratio``) and by the
        processor's time (``ratio_cpu``, which other programs disturb less).

    Raises:
        RuntimeError: A layer's numbers are wrong.
    """
    found = []
    for setting in memory:
        with process(setting, threads) as fresh:
            for layout in layouts:
                for shape in shapes:
                    progress(f"{setting}, {layout}, {shape}")
                    given = (shape, layout, ghost_size, rounds)
                    found.append({"memory": setting, **fresh.submit(_measure, *given).result()})
    return found


def _measure(shape: tuple[int, int, int, int], layout: str, ghost_size: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    x, dy = (torch.randn(shape).contiguous(memory_format=formats[layout]) for _ in range(2))
    layers = {name: make(shape[1], ghost_size) for name, make in CONTENDERS.items()}
    _check(layers, x, ghost_size)
    x.requires_grad_()

    def step(layer: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        x.grad = None
        synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        layer(x).backward(dy)
        synchronize()
        return time.perf_counter() - start, time.process_time() - start_cpu

    for layer in layers.values():  # compiles, allocates, fills caches
        step(layer), step(layer)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    names = list(layers)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            repeated = [step(layers[name]) for _ in range(3)]
            taken[name].append(tuple(statistics.median(values) for values in zip(*repeated, strict=True)))
    clock = {name: [sample[0] for sample in samples] for name, samples in taken.items()}
    cpu = {name: [sample[1] for sample in samples] for name, samples in taken.items()}
    return {
        "shape": list(shape),
        "layout": layout,
        "ghost_size": ghost_size,
        "ms": {name: _spread([1000 * s for s in samples]) for name, samples in clock.items()},
        "ratio": {name: _over(samples, clock[PLAIN]) for name, samples in clock.items()},
        "ratio_cpu": {name: _over(samples, cpu[PLAIN]) for name, samples in cpu.items()},
    }


def _over(samples: Sequence[float], plain: Sequence[float]) -> list[float]:
    return _spread([s / p for s, p in zip(samples, plain, strict=True)])


def _spread(samples: list[float]) -> list[float]:
    timing = Timing.of(samples)
    return [float(f"{v:.4g}") for v in (timing.median_s, timing.low_s, timing.high_s)]


def _check(layers: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, ghost_size: int) -> None:
    num_ghosts = max(len(x) // ghost_size, 1)
    expected = {PLAIN: batch_norm(x)[0]}
    if len(x) % num_ghosts == 0:
        expected[GHOST] = torch.empty_like(x)
        for ghost in range(num_ghosts):
            expected[GHOST][ghost::num_ghosts] = batch_norm(x[ghost::num_ghosts])[0]
    renorm = layers[RENORM]
    assert isinstance(renorm, BatchRenorm2d)
    renorm(x)
    # Within the limits it computes what inference does.
    expected[RENORM] = normalize_with(x, renorm.running_mean.clone(), renorm.running_var.clone())
    for name, y in expected.items():
        if not torch.allclose(layers[name](x), y, rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"the numbers of {name} are wrong for an input of shape {tuple(x.shape)}")
