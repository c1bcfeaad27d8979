"""What a recipe builds: every stage of its network with its output's shape and its parameters."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.train.build import network
from batchnorm.train.recipe import InceptionRecipe

PAPER = {
    "conv1": (64, 112, 112),
    "pool1": (64, 56, 56),
    "conv2": (192, 56, 56),
    "pool2": (192, 28, 28),
    "inception3a": (256, 28, 28),
    "inception3b": (320, 28, 28),
    "inception3c": (576, 14, 14),
    "inception4a": (576, 14, 14),
    "inception4b": (576, 14, 14),
    "inception4c": (576, 14, 14),
    "inception4d": (576, 14, 14),
    "inception4e": (1024, 7, 7),
    "inception5a": (1024, 7, 7),
    "inception5b": (1024, 7, 7),
    "pool": (1024, 1, 1),
}
"""Outputs by the paper's table (figure 5), channels first."""


@dataclass(frozen=True)
class Stage:
    """One row of the network's table."""

    name: str
    """Of the submodule."""
    shape: tuple[int, ...]
    """Of its output for one image: (C, H, W), or (C,)."""
    num_parameters: int
    """That training moves."""
    paper: tuple[int, ...] | None
    """The shape that the paper's table has, or None where it has no such row."""


def describe(recipe: InceptionRecipe, num_classes: int) -> list[Stage]:
    """The stages of the recipe's network, in the order in which an image passes them.

    Nothing is computed: the network is built without memory behind it.

    Args:
        recipe: What to build.
        num_classes: Outputs.
    """
    with torch.device("meta"):
        net = network(recipe, num_classes)
        shapes: dict[str, tuple[int, ...]] = {}
        stages = {name: module for name, module in net.named_children() if name != "heads"}
        heads = getattr(net, "heads", {})
        stages |= {f"heads.{name}": heads[name] for name in heads}
        for name, module in stages.items():
            module.register_forward_hook(_note(shapes, name))
        net(torch.empty(2, 3, recipe.image_size, recipe.image_size))
    return [
        Stage(name, shapes[name], sum(p.numel() for p in stages[name].parameters()), PAPER.get(name))
        for name in sorted(stages, key=list(shapes).index)
    ]


def _note(
    shapes: dict[str, tuple[int, ...]], name: str
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shapes[name] = tuple(output.shape[1:])

    return hook
