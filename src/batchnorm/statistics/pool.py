"""Running statistics of ranks that trained without synchronization, pooled into those of all their data."""

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import distributed
from batchnorm.layers import Normalization
from batchnorm.moments import Moments
from batchnorm.statistics.choose import store, unwrapped


@dataclass(frozen=True)
class PooledLayer:
    """What pooling found at one layer.

    Attributes:
        name: The layer's path in the model.
        between: How much of the pooled variance lies between the ranks' means, 0 to 1; the largest
            over channels. What an average of the variances would have missed.
    """

    name: str
    between: float


@dataclass(frozen=True)
class PoolReport:
    """What `pool_statistics` did; ``print`` shows it.

    Attributes:
        layers: Every layer whose statistics were pooled.
        num_ranks: Ranks that took part.
        shares: Weight of each rank, in their order; they sum to 1.
        notes: Layers that were left alone, each with the reason.
    """

    layers: tuple[PooledLayer, ...]
    num_ranks: int
    shares: tuple[float, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.3g}" for share in self.shares)
        head = f"pooled over {self.num_ranks} rank(s), weights {shares}"
        rows = [f"  {layer.name or '(model)'}: {layer.between:.1%} between ranks" for layer in self.layers]
        return "\n".join([head, *rows, *self.notes])


@torch.no_grad()
def pool_statistics(
    model: nn.Module, group: dist.ProcessGroup | None = None, *, num_samples: int | None = None
) -> PoolReport:
    """Make running statistics those of the data of all ranks, in place, on every rank.

    For layers that are not synchronized, where every rank's statistics are those of its own data:
    call it on all ranks before an evaluation or a checkpoint. Means and variances are merged as
    those of sets of samples, with the variance *between* the ranks' means: neither averaged, nor
    rank 0's. Every rank then has the same bits. One collective for the whole model, and a small one
    before that compares the ranks' models.

    ``num_batches_tracked`` becomes the largest of the ranks', so that with ``momentum=None`` the
    next batch of a rank weighs what it would have weighed without pooling. What waits in a handle of
    `commit_on_step` goes on waiting.

    Args:
        model: As every rank has it, in any wrapper. Layers of `torch.nn` and ours; frozen layers of
            ours, and layers without running statistics, are left alone.
        group: Process group of the ranks; the default group when ``None``. Without a process group
            this process is the only rank, and nothing changes.
        num_samples: How many samples this rank's statistics come from, as its weight; given by all
            ranks or by none. Without, all ranks weigh the same.

    Returns:
        Which layers were pooled, and how far the ranks were apart.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: No layer has statistics to pool; ``num_samples`` is negative, or zero on all
            ranks. On all ranks: the models differ, named by the first layer that does; some rank's
            statistics are not finite; or some ranks gave ``num_samples`` and others did not.

    Source: Chan, Golub & LeVeque (1983).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"pool_statistics needs a torch.nn.Module, got {type(model).__name__}")
    if num_samples is not None and num_samples < 0:
        raise ValueError(f"num_samples must not be negative, got {num_samples}")
    layers, notes = _choose(unwrapped(model))
    name = distributed.name_of(group, None)
    num_ranks = distributed.num_ranks(name)
    if num_ranks == 1:
        return PoolReport(tuple(PooledLayer(path, 0.0) for path in layers), 1, (1.0,), notes)
    _check_alike(layers, num_samples is not None, name)

    device = _device(layers)
    weight = 1.0 if num_samples is None else float(num_samples)
    parts_RP = _gather(_packed(layers, weight, device), name)
    weights_R = parts_RP[:, 0]
    _check_values(layers, parts_RP)
    total = weights_R.sum().item()
    found, position = [], 1
    for path, layer in layers.items():
        C = layer.running_mean.numel()
        means_RC, vars_RC, batches_R1 = parts_RP[:, position : position + 2 * C + 1].split([C, C, 1], dim=1)
        position += 2 * C + 1
        whole = Moments.pooled(means_RC, vars_RC, weights_R)
        within = Moments.pooled(torch.zeros_like(means_RC), vars_RC, weights_R).var
        between = torch.where(whole.var > 0, 1 - within / whole.var, 0).clamp(min=0)
        store(layer, whole.mean, whole.var)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(int(batches_R1.max().item()))
        found.append(PooledLayer(path, between.max().item() if C else 0.0))
    shares = tuple(w / total for w in weights_R.tolist())
    return PoolReport(tuple(found), num_ranks, shares, notes)


def _choose(network: nn.Module) -> tuple[dict[str, _BatchNorm], tuple[str, ...]]:
    layers: dict[str, _BatchNorm] = {}
    notes = []
    for path, layer in network.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if layer.running_mean is None or layer.running_var is None:
            notes.append(f"{path!r} left alone: it keeps no running statistics")
        elif isinstance(layer, Normalization) and layer.frozen:
            notes.append(f"{path!r} left alone: it is frozen")
        elif "running_cov" in layer._buffers:
            notes.append(f"{path!r} left alone: running covariances are not pooled; recalibrate(group=…) it")
        else:
            layers[path] = layer
    if not layers:
        why = ": " + "; ".join(notes) if notes else ""
        raise ValueError(f"{type(network).__name__} has no batch normalization with statistics to pool{why}")
    return layers, tuple(notes)


def _check_alike(layers: dict[str, _BatchNorm], is_weighed: bool, name: str) -> None:
    """Raise ``ValueError`` on all ranks unless they have the same layers."""
    here = [f"{path!r} with {layer.running_mean.numel()} channels" for path, layer in layers.items()]
    told = ["num_samples was given" if is_weighed else "num_samples was not given", *here]
    digest = zlib.crc32("\n".join(told).encode())
    device = _device(layers)
    digests = _gather(torch.tensor([float(digest)], dtype=torch.float64, device=device), name)
    if (digests == digest).all():
        return
    group = distributed.group_named(name)
    everyone: list[list[str]] = [[] for _ in range(distributed.num_ranks(name))]
    dist.all_gather_object(everyone, told, group=group)
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        if theirs[0] != first[0]:
            raise ValueError(
                f"on rank {rank} {theirs[0]}, on rank 0 {first[0]}: give it on all ranks or on none"
            )
    for rank, theirs in enumerate(everyone):
        for ours, other in zip([*first, "nothing more"], [*theirs, "nothing more"], strict=False):
            if ours != other:
                raise ValueError(
                    f"ranks have different models, whose statistics cannot be pooled: rank 0 has {ours} "
                    f"where rank {rank} has {other}. Build, convert and freeze the model alike on all ranks"
                )
    raise AssertionError("digests differ, and what they are of does not")


def _device(layers: dict[str, _BatchNorm]) -> torch.device:
    return next(iter(layers.values())).running_mean.device


def _packed(layers: dict[str, _BatchNorm], weight: float, device: torch.device) -> Tensor:
    parts = [torch.tensor([weight], dtype=torch.float64, device=device)]
    for layer in layers.values():
        tracked = layer.num_batches_tracked
        tracked = layer.running_mean.new_zeros(()) if tracked is None else tracked
        for tensor in (layer.running_mean, layer.running_var, tracked):
            parts.append(tensor.detach().to(device, torch.float64).flatten())
    return torch.cat(parts)


def _gather(packed: Tensor, name: str) -> Tensor:
    group = distributed.group_named(name)
    parts = [torch.empty_like(packed) for _ in range(distributed.num_ranks(name))]
    dist.all_gather(parts, packed, group=group)
    return torch.stack(parts)


def _check_values(layers: dict[str, _BatchNorm], parts_RP: Tensor) -> None:
    if parts_RP[:, 0].sum() <= 0:
        raise ValueError("num_samples is 0 on all ranks: there is nothing to pool")
    position = 1
    for path, layer in layers.items():
        size = 2 * layer.running_mean.numel() + 1
        sound = parts_RP[:, position : position + size].isfinite().all(1).tolist()
        position += size
        if not all(sound):
            raise ValueError(
                f"layer {path!r}: running statistics that are not finite on rank {sound.index(False)}, which "
                f"pooling would spread to all; recalibrate that rank's model, or load a checkpoint"
            )
