"""One step of training in float64, where what is zero by design is zero to the fifteenth digit."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from batchnorm.doctor.data import run_batch, tensors_of
from batchnorm.doctor.observe import norms_of
from batchnorm.statistics.feeding import Forward
from batchnorm.surgery.agreement import backward


@dataclass
class Step:
    """What a step does.

    Attributes:
        moved: How far each normalization's running mean went, in its stored deviations, root mean square.
        counted: Updates that it counted during the forward pass.
        counted_again: Updates that it counted during the backward pass.
        producers: Normalization to the module whose output is its input.
        dead_biases: Modules whose bias gets no gradient, and would if normalizations kept to their
            running statistics; to the largest gradient of that kind by the largest of their weights.
    """

    moved: dict[str, float] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    counted_again: dict[str, int] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)
    dead_biases: dict[str, float] = field(default_factory=dict)


def take_step(model: nn.Module, batch: Any, forward: Forward | None) -> Step:
    """Run a forward and a backward pass in training mode.

    Args:
        model: A copy, which is changed.
        batch: A batch that can be normalized by itself.
        forward: How to call the model.
    """
    model.double()
    for layer in norms_of(
        model
    ).values():  # another float64 than that of layers which stay wide by themselves
        for buffer in (layer.running_mean, layer.running_var):
            if buffer is not None:
                buffer.data = buffer.data.double()
    batch = tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, batch)
    model.train()  # the user's own, which may keep some layers from it
    layers = norms_of(model)
    found = Step()
    before = {name: _state(layer) for name, layer in layers.items()}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        with _producers(model, found):
            outputs = tensors_of(run_batch(model, batch, 0, forward))
        middle = {name: _state(layer) for name, layer in layers.items()}
        backward(outputs)
    for name, layer in layers.items():
        if before[name][0] is None:
            continue
        (mean, var, count), (_, _, between), (now, _, after) = before[name], middle[name], _state(layer)
        scale = (var.clamp(min=0) + layer.eps).sqrt()
        found.moved[name] = float(((now - mean) / scale).square().mean().sqrt())
        found.counted[name], found.counted_again[name] = between - count, after - between
    _find_dead_biases(model, batch, forward, found)
    return found


def _state(layer: Any) -> tuple[Any, Any, int]:
    tracked = layer.num_batches_tracked
    if layer.running_mean is None:
        return None, None, 0
    return layer.running_mean.clone(), layer.running_var.clone(), 0 if tracked is None else int(tracked)


@contextmanager
def _producers(model: nn.Module, found: Step) -> Iterator[None]:
    last: dict[int, tuple[str, Tensor]] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name in norms_of(model):

                def enter(_: Any, args: Any, name: str = name) -> None:
                    if args and id(args[0]) in last:
                        found.producers[name] = last[id(args[0])][0]

                hooks.callback(module.register_forward_pre_hook(enter).remove)
            elif not list(module.children()):

                def leave(_: Any, args: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor):
                        last[id(output)] = (name, output)  # kept, so that no other gets its id

                hooks.callback(module.register_forward_hook(leave).remove)
        yield


def _find_dead_biases(model: nn.Module, batch: Any, forward: Forward | None, found: Step) -> None:
    by_batch = _bias_gradients(model)
    for parameter in model.parameters():
        parameter.grad = None
    for layer in norms_of(model).values():
        layer.training = False
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        backward(tensors_of(run_batch(model, batch, 0, forward)))
    by_running = _bias_gradients(model)
    for name, share in by_batch.items():
        if share < 1e-9 and by_running.get(name, 0.0) > 1e-6:
            found.dead_biases[name] = share


def _bias_gradients(model: nn.Module) -> dict[str, float]:
    """Largest gradient of each module's bias by the largest of its weight's."""
    found = {}
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if name in norms_of(model) or not isinstance(weight, Tensor) or not isinstance(bias, Tensor):
            continue
        if weight.grad is not None and bias.grad is not None and float(weight.grad.abs().max()) > 0:
            found[name] = float(bias.grad.abs().max() / weight.grad.abs().max())
    return found
