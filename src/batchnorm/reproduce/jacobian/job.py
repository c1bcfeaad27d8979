"""One job: networks of one depth, nonlinearity, kind and seed, from every initial scale."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.data import ImageData, batch_indices, load, to_input
from batchnorm.reproduce.jacobian.experiment import KINDS, NETWORKS, Jacobian
from batchnorm.reproduce.jacobian.layers import Hidden, gradients, network, of_batch, of_examples, trace
from batchnorm.reproduce.parts import keep
from batchnorm.reproduce.pool import advance

PERCENTILES = (5, 10, 25, 40, 50, 55, 60, 75, 90, 95)
NEAR_1 = (0.5, 2.0)
ZERO = 1e-9
"""A singular value below this share of the largest is none: ReLU switches units off."""


def run_part(experiment: Jacobian, name: str, which: str, activation: str, kind: str, seed: int) -> None:
    """Train from each initial deviation, and measure on the way."""
    data = load(experiment.data, experiment.data_dir, progress=False)
    runs = [train(experiment, data, which, activation, kind, std, seed) for std in experiment.init_stds]
    keep(experiment.out, name, {"runs": runs})


def train(
    experiment: Jacobian, data: ImageData, which: str, activation: str, kind: str, init_std: float, seed: int
) -> dict[str, Any]:
    """One network by plain SGD; what `measure` found at each of its points, up to where it is not finite."""
    images = to_input(torch.from_numpy(data.train_images), binarize=True).flatten(1)
    labels = torch.from_numpy(data.train_labels)
    depth, steps, rate = experiment.training(which)
    net = network(
        in_features=images.shape[1],
        depth=depth,
        classes=len(data.classes),
        activation=activation,
        normalize=kind == "bn",
        init_std=init_std,
        seed=seed,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    found = []
    points = experiment.points(which)
    for step in range(steps + 1):
        if step in points:
            if not all(torch.isfinite(parameter).all() for parameter in net.parameters()):
                break
            one = measure(experiment, net, images, labels, which, init_std == experiment.headline_std)
            found.append({"step": step, **one})
        if step < steps:
            chosen = batch_indices(step, experiment.batch_size, len(labels), seed)
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    advance(steps)
    return {"init_std": init_std, "points": found}


def measure(
    experiment: Jacobian, net: nn.Module, images: Tensor, labels: Tensor, which: str, headline: bool
) -> dict[str, Any]:
    """Jacobians and gradients on the first training examples, which are the same at every point.

    Returns:
        ``loss``; ``gradient`` and ``weight_gradient``, norms for each hidden layer; ``singular``, for each
        hidden layer from the second on what `spectrum` says, as lists over the layers; for the paper's
        network ``conditions``, and with BN, for the headline's scale, ``whole``: `spectrum` of a whole
        batch's Jacobian, and of its examples' with the statistics held fixed.
    """
    batch = images[: experiment.batch_size]
    loss, gradient, weight_gradient = gradients(net, batch, labels[: experiment.batch_size])
    layers = trace(net, batch)
    spectra = [
        spectrum(of_examples(before, after, experiment.examples)) for before, after in pairwise(layers)
    ]
    result: dict[str, Any] = {
        "loss": loss,
        "gradient": gradient,
        "weight_gradient": weight_gradient,
        "singular": {name: [one[name] for one in spectra] for name in spectra[0]},
    }
    if which == "paper":
        many = trace(net, images[: experiment.condition_examples])
        result["conditions"] = [conditions(before, after) for before, after in pairwise(many)]
        if headline and layers[-1].normalized:
            few = trace(net, images[: experiment.whole_batch])
            result["whole"] = [
                {
                    "through": spectrum(of_batch(before, after)[None]),
                    "fixed": spectrum(of_examples(before, after, experiment.whole_batch)),
                }
                for before, after in pairwise(few)
            ]
    return result


def spectrum(jacobians: Tensor) -> dict[str, Any]:
    """Of the singular values of (E, U, U') matrices, all together.

    Returns:
        ``percentiles``; ``rms``, the root of the mean square; ``share``, within `NEAR_1`; ``zero``, the share
        that is none; ``condition``, largest over smallest, the median of the examples.
    """
    values = torch.linalg.svdvals(jacobians)
    largest, smallest = values[:, 0], values[:, -1]
    none = values <= ZERO * largest[:, None]
    every = values.masked_fill(none, 0.0).flatten()
    levels = torch.tensor([level / 100 for level in PERCENTILES], dtype=values.dtype)
    return {
        "percentiles": torch.quantile(every, levels).tolist(),
        "rms": every.square().mean().sqrt().item(),
        "share": ((every >= NEAR_1[0]) & (every <= NEAR_1[1])).double().mean().item(),
        "zero": none.double().mean().item(),
        "condition": torch.where(none[:, -1], torch.inf, largest / smallest).median().item(),
    }


def conditions(before: Hidden, after: Hidden) -> dict[str, float]:
    """Whether x̂ is Gaussian and uncorrelated, and the map to the next layer straight, as 3.3 supposes.

    Returns:
        ``correlation``, mean |correlation| of two units of x̂; ``kurtosis``, the mean over units of the
        excess (0 for Gaussians); ``linear``, the share of the next layer's variance that the best linear map
        of x̂ explains; ``directions``, the effective number of directions of x̂: (Σλ)²/Σλ², of 100 if
        it were white.
    """
    x = before.x_hat - before.x_hat.mean(0)
    std = x.square().mean(0).sqrt().clamp(min=1e-30)
    x = x / std
    correlation = x.T @ x / len(x)
    apart = correlation - torch.diag(torch.diag(correlation))
    units = x.shape[1]
    target = after.x_hat - after.x_hat.mean(0)
    fitted = x @ torch.linalg.lstsq(x, target, driver="gelsd").solution
    eigenvalues = torch.linalg.eigvalsh(correlation)
    return {
        "correlation": (apart.abs().sum() / (units * (units - 1))).item(),
        "kurtosis": (x**4).mean(0).mean().item() - 3,
        "linear": (1 - (target - fitted).square().sum() / target.square().sum()).item(),
        "directions": (eigenvalues.sum() ** 2 / eigenvalues.square().sum()).item(),
    }


def names(experiment: Jacobian) -> dict[str, tuple[Jacobian, str, str, str, str, int]]:
    """All parts by name, with the arguments of `run_part`; the long ones first."""
    return {
        f"{which}-{activation}-{kind}-seed-{seed}": (
            experiment, f"{which}-{activation}-{kind}-seed-{seed}", which, activation, kind, seed
        )
        for which in reversed(NETWORKS)
        for activation in experiment.activations
        for kind in KINDS
        for seed in range(experiment.seeds)
    }  # fmt: skip


def num_steps(experiment: Jacobian, name: str) -> int:
    """Steps that the part of this name reports."""
    return experiment.training(name.split("-")[0])[1] * len(experiment.init_stds)
