"""The fully connected network of the paper's first experiment."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}
"""Nonlinearities of the hidden layers by name."""


def mlp(
    in_features: int = 28 * 28,
    hidden: Sequence[int] = (100, 100, 100),
    classes: int = 10,
    *,
    activation: str = "sigmoid",
    init_std: float = 0.1,
    seed: int | None = None,
) -> nn.Sequential:
    """Three layers of 100 sigmoids and a linear output, without Batch Normalization.

    The weights are Gaussian with mean 0 and the biases zero. The paper says "small random Gaussian"
    and no number; a deviation of 0.1 is this project's choice. The children are named `flatten`,
    `linear1`, `sigmoid1`, …, `output`, so `batchnorm.insert` can normalize the input of each
    nonlinearity and say where it did.

    Args:
        in_features: Numbers in one example; the input has shape (N, …) with that many in each row.
        hidden: Units of each hidden layer.
        classes: Outputs; the network returns logits of shape (N, classes).
        activation: One of `ACTIVATIONS`.
        init_std: Deviation of every weight.
        seed: Seed of a generator of the network's own; None draws from torch's global one.

    Returns:
        The network in training mode, float32 on the CPU.

    Raises:
        ValueError: A size below 1, no hidden layer, an unknown activation or a negative deviation.

    Source: Ioffe & Szegedy (2015), section 4.1.
    """
    sizes = [in_features, *hidden, classes]
    if not hidden or min(sizes) < 1:
        raise ValueError(
            f"in_features, every entry of hidden (at least one) and classes must be 1 or more, "
            f"got {in_features}, {tuple(hidden)} and {classes}."
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}.")
    if not init_std >= 0:
        raise ValueError(f"init_std is a standard deviation and cannot be {init_std}.")

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    children: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, units) in enumerate(zip(sizes[:-2], hidden, strict=True), start=1):
        children[f"linear{number}"] = _linear(inputs, units, init_std, generator)
        children[f"{activation}{number}"] = ACTIVATIONS[activation]()
    children["output"] = _linear(hidden[-1], classes, init_std, generator)
    return nn.Sequential(children)


def _linear(inputs: int, units: int, std: float, generator: torch.Generator | None) -> nn.Linear:
    # skip_init: nn.Linear's own initialization would draw from the global generator in vain.
    layer = nn.utils.skip_init(nn.Linear, inputs, units)
    nn.init.normal_(layer.weight, std=std, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
