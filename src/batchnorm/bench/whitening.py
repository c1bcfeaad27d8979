"""What whitening costs: forward and backward against channels and group size, in training."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from batchnorm.bench.timing import Timing, process, synchronize
from batchnorm.kernels import whitening
from batchnorm.layers import BatchNorm2d, WhitenedBatchNorm2d

CHANNELS = (32, 64, 128, 256)
GROUPS = (1, 4, 16, 64)
PLAIN = "plain"
_EPS = 1e-5


def measure(
    *,
    channels: Sequence[int] = CHANNELS,
    groups: Sequence[int] = GROUPS,
    batch: int = 32,
    side: int = 16,
    iterations: int = 5,
    rounds: int = 15,
    threads: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time whitening beside the plain layer and beside an eigendecomposition, in turns.

    Args:
        channels: Of the input, one case each.
        groups: Channels that are whitened together; those above the input's are left out.
        batch: Images.
        side: Pixels.
        iterations: Of Newton's method.
        rounds: Samples of each contender.
        threads: PyTorch's threads; 0 leaves its own choice.
        progress: Told what is going on.

    Returns:
        For each case, as median and quartiles over rounds: milliseconds (``ms``), and time over the
        plain layer's in the same round by the clock (``ratio``) and by the processor's time
        (``ratio_cpu``, which other programs disturb less). "newton G" whitens groups of G, "zca G" by
        `torch.linalg.eigh`.

    Raises:
        RuntimeError: The two whiten differently.
    """
    found = []
    for num in channels:
        progress(f"{num} channels")
        with process("kept", threads) as fresh:
            given = (num, [g for g in groups if g <= num], batch, side, iterations, rounds)
            found.append(fresh.submit(_measure, *given).result())
    return found


def _measure(
    channels: int, groups: Sequence[int], batch: int, side: int, iterations: int, rounds: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    x, dy = torch.randn(2, batch, channels, side, side).unbind()
    x.requires_grad_()
    plain = BatchNorm2d(channels)
    contenders: dict[str, Callable[[Tensor], Tensor]] = {PLAIN: plain}
    for group in groups:
        _check(x.detach(), group)
        contenders[f"newton {group}"] = WhitenedBatchNorm2d(
            channels, group_channels=group, iterations=iterations
        )
        contenders[f"zca {group}"] = _by_eigenvectors(group)

    def step(layer: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        x.grad = None
        synchronize()
        start, start_cpu = time.perf_counter(), time.process_time()
        layer(x).backward(dy)
        synchronize()
        return time.perf_counter() - start, time.process_time() - start_cpu

    for layer in contenders.values():  # allocates, fills caches
        step(layer)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(step(contenders[name]))

    def over(name: str, place: int) -> list[float]:
        pairs = zip(taken[name], taken[PLAIN], strict=True)
        return _spread([mine[place] / theirs[place] for mine, theirs in pairs])

    return {
        "shape": [batch, channels, side, side],
        "iterations": iterations,
        "ms": {name: _spread([1000 * s for s, _ in samples]) for name, samples in taken.items()},
        "ratio": {name: over(name, 0) for name in names},
        "ratio_cpu": {name: over(name, 1) for name in names},
    }


def _by_eigenvectors(group: int) -> Callable[[Tensor], Tensor]:
    """The same layer with the exact root, by the decomposition that frameworks have."""

    def whiten(x: Tensor) -> Tensor:
        rows = x.transpose(0, 1).flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        parts = centred.unflatten(0, (-1, group))
        values, vectors = torch.linalg.eigh(
            parts @ parts.mT / rows.shape[1] + _EPS * torch.eye(group, dtype=x.dtype)
        )
        root = vectors * values.rsqrt().unsqueeze(-2) @ vectors.mT
        shape = (x.shape[1], x.shape[0], *x.shape[2:])
        return (root @ parts).reshape(shape).transpose(0, 1).contiguous()

    return whiten


def _check(x: Tensor, group: int) -> None:
    settings = {"group": group, "iterations": 30, "channel_dim": 1}
    y, _ = whitening.forward(x, None, None, None, None, _EPS, "identity", **settings)
    if not torch.allclose(y, _by_eigenvectors(group)(x), rtol=1e-3, atol=1e-3):
        raise RuntimeError(f"Newton and eigenvectors whiten groups of {group} differently")


def _spread(samples: list[float]) -> list[float]:
    timing = Timing.of(samples)
    return [float(f"{v:.4g}") for v in (timing.median_s, timing.low_s, timing.high_s)]
