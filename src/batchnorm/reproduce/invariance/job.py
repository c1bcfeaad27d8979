"""The two measurements: the equations on layers, and training from small and large weights."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.data import ImageData, batch_indices, load, to_input
from batchnorm.layers import BatchNorm2d
from batchnorm.models import mlp
from batchnorm.reproduce.invariance.equations import conv_layer, conv_network, fc_layer, try_layer
from batchnorm.reproduce.invariance.experiment import LAYERS, STATES, Invariance
from batchnorm.reproduce.parts import keep, log_grid
from batchnorm.reproduce.pool import advance
from batchnorm.surgery import insert

PRIOR_RATE = 0.5


def run_part(experiment: Invariance, name: str, what: str, kind: str, seed: int) -> None:
    """One part: ``what`` is "equations" on a layer, or "training" with or without BN."""
    data = load(experiment.data, experiment.data_dir, progress=False)
    images = to_input(torch.from_numpy(data.train_images), binarize=True)
    labels = torch.from_numpy(data.train_labels)
    if what == "equations":
        found: Any = equations(experiment, data, images, labels, kind, seed)
    else:
        found = {
            "runs": [
                train(experiment, images.flatten(1), labels, kind == "bn", rate, init_std, seed)
                for rate in experiment.rates
                for init_std in experiment.init_stds
            ]
        }
    keep(experiment.out, name, found)


def equations(
    experiment: Invariance, data: ImageData, images: Tensor, labels: Tensor, kind: str, seed: int
) -> dict[str, Any]:
    """`try_layer` of the initial and of the trained layer."""
    classes, shape = len(data.classes), images.shape
    if kind == "fc":
        plain = mlp(shape[1:].numel(), classes=classes, seed=seed)
        net: Any = insert(plain, images[:2])[0]
    else:
        images = images.unsqueeze(1)
        net = conv_network(classes, BatchNorm2d, seed=seed)
    probe = images[: experiment.examples]
    found = {}
    for state in STATES:
        if state == "trained":
            optimizer = torch.optim.SGD(net.parameters(), lr=PRIOR_RATE)
            for step in range(experiment.prior_steps):
                chosen = batch_indices(step, experiment.batch_size, len(labels), seed)
                optimizer.zero_grad()
                F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
                optimizer.step()
            advance(experiment.prior_steps)
        layer = (fc_layer if kind == "fc" else conv_layer)(net, probe)
        found[state] = try_layer(layer, experiment.scales, experiment.eps, seed)
    return found


def train(
    experiment: Invariance,
    images: Tensor,
    labels: Tensor,
    normalize: bool,
    rate: float,
    init_std: float,
    seed: int,
) -> dict[str, Any]:
    """The paper's network, from weights of deviation ``init_std``, by plain SGD.

    The output layer starts at 0.1 always, as no normalization follows it.

    Returns:
        At steps of a logarithmic grid, for the second hidden layer: ‖W‖, the norm of its gradient, the
        cosine between the two, and the mean loss since the grid's step before. For each hidden layer
        the growth of ‖W‖² in all steps, and the sum of rate²·‖gradient‖², which it is if the gradient
        stands at a right angle to W. The mean loss and accuracy over the last tenth of the steps.
    """
    net: nn.Module = mlp(images.shape[1], seed=seed, init_std=1.0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(0.1 if name.startswith("output") else init_std)
    if normalize:
        net = insert(net, images[:2])[0]
    weights = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)][:-1]
    at_first = [_square(weight) for weight in weights]
    steps_taken = [0.0 for _ in weights]
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    record: dict[str, Any] = {name: [] for name in ("step", "loss", "weight", "gradient", "cosine")}
    points, reported = set(log_grid(experiment.steps)), 0
    losses, right = [], []
    for step in range(experiment.steps + 1):
        chosen = batch_indices(step, experiment.batch_size, len(labels), seed)
        logits = net(images[chosen])
        loss = F.cross_entropy(logits, labels[chosen])
        losses.append(loss.item())
        right.append((logits.argmax(1) == labels[chosen]).double().mean().item())
        optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in weights]
        if step in points:
            middle, its = weights[1].detach().double(), gradients[1].double()
            record["step"].append(step)
            record["loss"].append(sum(losses[reported:]) / len(losses[reported:]))
            record["weight"].append(middle.norm().item())
            record["gradient"].append(its.norm().item())
            record["cosine"].append(((middle * its).sum() / (middle.norm() * its.norm())).item())
            reported = len(losses)
        if step < experiment.steps:
            steps_taken = [s + rate**2 * _square(g) for s, g in zip(steps_taken, gradients, strict=True)]
            optimizer.step()
    advance(experiment.steps)
    tail = max(1, experiment.steps // 10)
    return {
        "rate": rate,
        "init_std": init_std,
        **record,
        "growth": [_square(w) - first for w, first in zip(weights, at_first, strict=True)],
        "steps_taken": steps_taken,
        "final_loss": sum(losses[-tail:]) / tail,
        "final_accuracy": sum(right[-tail:]) / tail,
    }


def _square(t: Tensor) -> float:
    return t.detach().double().square().sum().item()


def names(experiment: Invariance) -> dict[str, tuple[Invariance, str, str, str, int]]:
    """All parts by name, with the arguments of `run_part`; the long ones first."""
    found = {}
    for what, kinds in (("training", ("bn", "plain")), ("equations", LAYERS)):
        for kind in kinds:
            for seed in range(experiment.seeds):
                name = f"{what}-{kind}-seed-{seed}"
                found[name] = (experiment, name, what, kind, seed)
    return found


def num_steps(experiment: Invariance, name: str) -> int:
    """Steps that the part of this name reports."""
    if name.startswith("equations"):
        return experiment.prior_steps
    return experiment.steps * len(experiment.rates) * len(experiment.init_stds)
