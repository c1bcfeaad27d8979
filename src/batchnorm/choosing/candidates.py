"""What can be tried in a model: each kind of normalization, by name, or why it cannot."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.choosing.group_norm import num_groups, with_group_norm
from batchnorm.surgery import convert, freeze
from batchnorm.surgery.models import copied

GHOST_SIZE = 32
"""Examples in a virtual batch where the batch is at least twice as large; else half the batch."""
R_MAX, D_MAX = 3.0, 5.0
"""Limits of "renorm", from the first step on: those that the paper ends with, as a trial is too short for a
schedule of thousands of steps."""
WINDOW = 32
"""Examples in the window of "accumulated", which smaller batches fill together, eight of them at most."""
GROUPS = 32
"""Of group normalization, at most: `batchnorm.choosing.group_norm.num_groups`."""


class Unsuited(ValueError):
    """A candidate cannot be tried in this model, or would be no other than one that is; says why."""


@dataclass(frozen=True)
class Settings:
    """What candidates depend on beside the model.

    Attributes:
        batch_size: Examples in a step.
        ghost_size: Of "ghost"; None for what `GHOST_SIZE` says.
        groups: Of "group", at most.
    """

    batch_size: int
    ghost_size: int | None = None
    groups: int = GROUPS


@dataclass(frozen=True)
class Built:
    """A candidate.

    Attributes:
        model: A copy of the model.
        about: What is in it, in words.
    """

    model: nn.Module
    about: str


def build(name: str, model: nn.Module, settings: Settings) -> Built:
    """A copy of the model with its normalizations of the kind of that name.

    Raises:
        Unsuited: That makes no sense here.
        ValueError: There is no such kind, or the model cannot be copied.
    """
    check_names([name])
    return CANDIDATES[name](model, settings)


def check_names(names: list[str]) -> None:
    """Refuse names that stand for nothing, and none at all.

    Raises:
        ValueError: One does, or comes twice.
    """
    if unknown := [name for name in names if name not in CANDIDATES]:
        raise ValueError(f"no candidate {unknown[0]!r}; there are {', '.join(map(repr, CANDIDATES))}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"candidates must be at least one, and different from each other, got {names}")


def norms_of(model: nn.Module) -> dict[str, _BatchNorm]:
    """A model's batch normalizations by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, _BatchNorm)}


def _plain(model: nn.Module, settings: Settings) -> Built:
    return _converted(model, "plain", "every batch's own statistics")


def _ghost(model: nn.Module, settings: Settings) -> Built:
    size = settings.ghost_size
    if size is None:
        size = min(GHOST_SIZE, settings.batch_size // 2)
    if size < 2 or 2 * size > settings.batch_size:
        raise Unsuited(
            f"virtual batches have two examples or more, and a batch of {settings.batch_size} has not two "
            f"of {max(2, size)}"
        )
    return _converted(model, "ghost", f"virtual batches of {size}", ghost_size=size)


def _renorm(model: nn.Module, settings: Settings) -> Built:
    about = f"corrected towards the running statistics, r up to {R_MAX:g} and d to {D_MAX:g}"
    return _converted(model, "renorm", about, r_max=R_MAX, d_max=D_MAX)


def _accumulated(model: nn.Module, settings: Settings) -> Built:
    if 2 * settings.batch_size > WINDOW:
        raise Unsuited(f"it joins small batches into {WINDOW} examples, and these have {settings.batch_size}")
    window = min(8, WINDOW // settings.batch_size)
    return _converted(model, "accumulated", f"by the last {window} batches", micro_batches=window)


def _evalnorm(model: nn.Module, settings: Settings) -> Built:
    size = settings.batch_size
    about = f"plain, and at inference an example weighs as one of {size}"
    return _converted(model, "evalnorm", about, batch_size=size)


def _whitened(model: nn.Module, settings: Settings) -> Built:
    return _converted(model, "whitened", "groups of channels whitened")


def _synced(model: nn.Module, settings: Settings) -> Built:
    if dist.is_available() and dist.is_initialized():
        raise Unsuited(
            "trials run in one process; with r ranks it is what plain is at r times the batch size"
        )
    raise Unsuited("outside a process group it is plain; with r ranks, plain at r times the batch size")


def _frozen(model: nn.Module, settings: Settings) -> Built:
    for path, layer in norms_of(model).items():
        if layer.running_mean is None or layer.running_var is None:
            raise Unsuited(f"{path} keeps no running statistics")
        if bool((layer.running_mean == 0).all() and (layer.running_var == 1).all()):
            raise Unsuited(f"the statistics of {path} are those of a new layer: it needs a trained model's")
    new = copied(model)
    report = freeze(new)
    _check(len(report.changes), [f"{refusal.where}: {refusal.reason}" for refusal in report.refusals])
    return Built(new, "held at the running statistics that the model came with")


def _group(model: nn.Module, settings: Settings) -> Built:
    new, count, left = with_group_norm(model, settings.groups)
    _check(count, left)
    groups = sorted({num_groups(layer, settings.groups) for layer in norms_of(model).values()})
    shown = str(groups[0]) if len(groups) == 1 else f"{groups[0]} to {groups[-1]}"
    return Built(new, f"torch.nn.GroupNorm, {shown} groups{_besides(left)}")


def _converted(model: nn.Module, to: str, about: str, **options: object) -> Built:
    new, report = convert(model, to, **options)
    left = [f"{refusal.where}: {refusal.reason}" for refusal in report.refusals]
    if to != "plain":
        _check(len(report.changes), left)
    return Built(new, about + _besides(left))


def _check(changed: int, left: list[str]) -> None:
    if not changed:
        raise Unsuited(left[0] if left else "the model's layers are of that kind already")


def _besides(left: list[str]) -> str:
    return f" ({len(left)} left as they are: {left[0]})" if left else ""


CANDIDATES: Mapping[str, Callable[[nn.Module, Settings], Built]] = {
    "plain": _plain,
    "ghost": _ghost,
    "renorm": _renorm,
    "group": _group,
    "frozen": _frozen,
    "synced": _synced,
    "accumulated": _accumulated,
    "evalnorm": _evalnorm,
    "whitened": _whitened,
}
"""By name; the first is what others are compared with."""
USUAL = ("plain", "ghost", "renorm", "group", "frozen", "synced")
"""Those that are tried where none are named: each more takes time from all."""
