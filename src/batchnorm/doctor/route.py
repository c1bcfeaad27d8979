"""The modules that data pass on their way through a model, in that order."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.doctor.data import run_batch
from batchnorm.doctor.observe import held, set_mode
from batchnorm.statistics.feeding import Forward


@dataclass(frozen=True)
class Stop:
    """A module without children, or a normalization, where the data call first.

    Attributes:
        name: Path in the model.
        kind: Class.
        shape: Of its output; empty if that is no tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...]


@torch.no_grad()
def route(
    model: nn.Module, batch: Any, forward: Forward | None, resting: Sequence[str] = ()
) -> tuple[Stop, ...]:
    """Run a batch in evaluation mode and note whom it meets."""
    met: dict[str, Stop] = {}
    with held(model), ExitStack() as hooks:
        set_mode(model, "inference", resting)
        for name, module in model.named_modules():
            if list(module.children()) and not isinstance(module, _BatchNorm):
                continue

            def leave(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                shape = tuple(output.shape) if isinstance(output, Tensor) else ()
                met.setdefault(name, Stop(name, type(module).__name__, shape))

            hooks.callback(module.register_forward_hook(leave).remove)
        run_batch(model, batch, 0, forward)
    return tuple(met.values())
