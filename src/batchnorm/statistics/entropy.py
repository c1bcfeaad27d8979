"""γ and β that make predictions certain: entropy minimization at test time."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Adam, Optimizer

from batchnorm.statistics.feeding import Forward, run
from batchnorm.statistics.own import ignored
from batchnorm.statistics.predictions import Logits, Predictions, entropies

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]

_FEWEST_LEFT = 0.5
"""Share of the effective number of predicted classes that has to be left after learning."""


def scales_and_shifts(layers: dict[str, _BatchNorm]) -> list[nn.Parameter]:
    """γ and β of the layers, each once.

    Raises:
        ValueError: There are none.
    """
    found = {id(p): p for layer in layers.values() for p in (layer.weight, layer.bias) if p is not None}
    if not found:
        raise ValueError(
            f"none of the layers {', '.join(map(repr, layers))} has γ or β (affine=False), and nothing else "
            'learns in method="entropy": use "statistics" or "blended"'
        )
    return list(found.values())


def learn(
    model: nn.Module,
    layers: dict[str, _BatchNorm],
    batches: Iterable[Any],
    forward: Forward,
    logits: Logits,
    *,
    rate: float,
    optimizer: MakeOptimizer | None,
    epochs: int,
) -> list[float]:
    """Step down the mean entropy of each batch's predictions in γ and β; everything else stays.

    Layers are left in training mode: each batch is normalized by itself. Gradients that the parameters
    have, and whether they want any, are afterwards as before.

    Args:
        model: In evaluation mode.
        layers: Whose γ and β learn.
        batches: Each makes one step.
        forward: As in `adapt`.
        logits: As in `adapt`.
        rate: Of Adam.
        optimizer: Makes another optimizer from the list of parameters.
        epochs: How often to go through the batches.

    Returns:
        Mean entropy of each step's batch before the step, nats.

    Raises:
        ValueError: An entropy or a parameter is not finite; parameters may have changed by then.

    Source: Wang et al. (2021), Tent.
    """
    parameters = scales_and_shifts(layers)
    wanted = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    course = []
    try:
        for p in model.parameters():
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        stepper = Adam(parameters, lr=rate) if optimizer is None else optimizer(parameters)
        for layer in layers.values():
            layer.training = True
        with torch.inference_mode(False), torch.enable_grad(), ignored(layers):
            for index, batch in enumerate(batch for _ in range(epochs) for batch in batches):
                for p in parameters:
                    p.grad = None
                loss = entropies(logits(run(forward, model, batch, index))).mean()
                loss.backward()
                if not all(
                    t.isfinite().all() for t in (loss, *(p.grad for p in parameters if p.grad is not None))
                ):
                    raise ValueError(
                        f"batch {index}: the entropy of its predictions, or its gradient, is not finite. "
                        "Leave such batches out; nothing was changed"
                    )
                stepper.step()
                course.append(loss.item())
    finally:
        for p, flag, gradient in wanted:
            p.requires_grad_(flag)
            p.grad = gradient
    return course


def collapsed(start: Predictions, end: Predictions) -> str | None:
    """Why learning was no adaptation: predictions gather in few classes; ``None`` if they do not.

    Certainty alone is had most cheaply by predicting the same class always.

    Args:
        start: With statistics of the data, before learning.
        end: After it.
    """
    if end.effective_classes >= _FEWEST_LEFT * start.effective_classes:
        return None
    return (
        f"learning collapsed: predictions that fell on {start.effective_classes:.3g} effective classes fall "
        f"on {end.effective_classes:.3g}, class {end.favourite} has {max(end.shares):.0%} of them. All "
        "is as it was before; use a smaller rate, larger batches with all classes mixed, or "
        'method="statistics"'
    )
