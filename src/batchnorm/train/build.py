"""From a recipe to the network, optimizer and device that it asks for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from batchnorm.models import mlp
from batchnorm.surgery import insert
from batchnorm.train.recipe import Recipe


def build_model(recipe: Recipe, image_shape: tuple[int, int], num_classes: int) -> nn.Module:
    """The recipe's network with its initial weights, in training mode on the CPU.

    Networks with and without `normalize` begin with the same weights.

    Args:
        recipe: What to build.
        image_shape: Height and width of an input in pixels; the input has shape (N, H, W).
        num_classes: Outputs.

    Raises:
        ValueError: Batch Normalization was asked for and some nonlinearity could not get it.
    """
    height, width = image_shape
    model: nn.Module = mlp(
        height * width,
        recipe.hidden,
        num_classes,
        activation=recipe.activation,
        init_std=recipe.init_std,
        seed=recipe.seed,
    )
    if not recipe.normalize:
        return model
    model, report = insert(model, torch.zeros(2, height, width))
    if report.refusals:
        raise ValueError(f"normalize: not every nonlinearity of {recipe.model} can be normalized.\n{report}")
    return model.train()


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's update rule over all parameters of `model`."""
    parameters, rate, decay = model.parameters(), recipe.learning_rate, recipe.weight_decay
    match recipe.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, rate, momentum=recipe.momentum, weight_decay=decay)
        case "adagrad":
            return torch.optim.Adagrad(parameters, rate, weight_decay=decay)
        case "adam":
            return torch.optim.Adam(parameters, rate, weight_decay=decay)


def resolve_device(name: str) -> torch.device:
    """The device called `cpu`, `cuda` or `auto` (a GPU when there is one).

    Raises:
        ValueError: A GPU was asked for by name and there is none that this PyTorch can use.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but this PyTorch sees no GPU; use cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@contextmanager
def process_settings(recipe: Recipe, device: torch.device) -> Iterator[None]:
    """Threads and random numbers as the recipe wants them, and on leaving as they were."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            if recipe.threads:
                torch.set_num_threads(recipe.threads)
            torch.manual_seed(recipe.seed)
            yield
    finally:
        torch.set_num_threads(threads)
