"""From a recipe to the network, optimizer and device that it asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from batchnorm.models import inception, mlp
from batchnorm.surgery import accelerate, convert, insert
from batchnorm.train.recipe import InceptionRecipe, MLPRecipe, Recipe


def build_model(recipe: Recipe, image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """The recipe's network with its initial weights, in training mode on the CPU.

    Networks with and without `normalize` begin with the same weights. With `sync_bn` the layers share
    batches with the other ranks of the default process group, if there is one.

    Args:
        recipe: What to build.
        image_shape: Of one image, (H, W) or (3, H, W); the network's input has shape (N, *image_shape).
        num_classes: Outputs.

    Raises:
        ValueError: Recipe and images do not fit, or Batch Normalization was asked for and some
            nonlinearity could not get it.
    """
    if isinstance(recipe, InceptionRecipe):
        model = _inception(recipe, image_shape, num_classes)
    else:
        assert isinstance(recipe, MLPRecipe)
        model = _mlp(recipe, image_shape, num_classes)
    if not recipe.sync_bn:
        return model
    model, report = convert(model, to="synced")
    if report.refusals:
        raise ValueError(f"sync_bn: not every layer of {recipe.model} can be synchronized.\n{report}")
    return model


def _mlp(recipe: MLPRecipe, image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    if len(image_shape) != 2:
        raise ValueError(
            f"the recipe's network, {recipe.model}, takes grey images of shape (H, W), and these have shape "
            f"{tuple(image_shape)}: use a recipe of the inception kind, such as bn-x5 with --scale cifar10."
        )
    model: nn.Module = mlp(
        image_shape[0] * image_shape[1],
        recipe.hidden,
        num_classes,
        activation=recipe.activation,
        init_std=recipe.init_std,
        seed=recipe.seed,
    )
    if not recipe.normalize:
        return model
    model, report = insert(model, torch.zeros(2, *image_shape))
    if report.refusals:
        raise ValueError(f"normalize: not every nonlinearity of {recipe.model} can be normalized.\n{report}")
    return model.train()


def _inception(recipe: InceptionRecipe, image_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    size = recipe.image_size
    if tuple(image_shape) != (3, size, size):
        raise ValueError(
            f"the recipe's network takes images of shape (3, {size}, {size}), and these have shape "
            f"{tuple(image_shape)}: use --scale cifar10 for 32×32 colour images, or set image_size."
        )
    # By decree, not by measurement, so that a run that is taken up computes with the same bits.
    plain: Any = network(recipe, num_classes)
    plain.to(memory_format=torch.channels_last)
    model, _ = accelerate(plain, torch.zeros(2, 3, size, size), channels_last=True, keep_memory=False)
    return model


def network(recipe: InceptionRecipe, num_classes: int) -> nn.Module:
    """The recipe's network of plain `torch.nn` layers, as `batchnorm.models.inception` builds it."""
    return inception(
        num_classes,
        normalize=recipe.normalize,
        activation=recipe.activation,
        stem=recipe.stem,
        image_size=recipe.image_size,
        width=recipe.width,
        projection=recipe.projection,
        separable=recipe.separable,
        heads=recipe.heads,
        response_norm=recipe.response_norm,
        dropout=recipe.dropout,
        per_activation=recipe.per_activation,
        init_scale=recipe.init_scale,
        seed=recipe.seed,
    )


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
