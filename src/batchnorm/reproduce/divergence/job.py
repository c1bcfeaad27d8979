"""The two measurements: the section's example, and whole networks in training."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.data import ImageData, batch_indices, load, to_input
from batchnorm.models import mlp
from batchnorm.reproduce.divergence.experiment import KINDS, Divergence
from batchnorm.reproduce.divergence.layers import network
from batchnorm.reproduce.parts import keep, log_grid
from batchnorm.reproduce.pool import advance

DTYPES = {"float32": torch.float32, "float64": torch.float64}
GROWN = 10.0
"""Hidden weights and biases have grown when their norm is this many times what it was at first."""


def run_part(experiment: Divergence, name: str, kind: str, activation: str, seed: int) -> None:
    """One part of the experiment; the kind ``bias`` is the section's example."""
    data = load(experiment.data, experiment.data_dir, progress=False)
    if kind == "bias":
        found: Any = [
            bias_alone(experiment, data, rate, seed, scales=scales, dtype=dtype)
            for scales in (False, True)
            for dtype in DTYPES
            for rate in experiment.rates
        ]
    else:
        found = [train(experiment, data, kind, activation, rate, seed) for rate in experiment.rates]
    keep(experiment.out, name, {"runs": found})


def bias_alone(
    experiment: Divergence, data: ImageData, rate: float, seed: int, *, scales: bool, dtype: str
) -> dict[str, Any]:
    """x̂ = u + b − E[u + b], divided by the deviation where ``scales``; only b learns.

    u is W times the images, W the first layer of the paper's network; x̂ goes through sigmoids to the
    output layer. Every step sees all examples, and the gradient takes the statistics for constants.

    Returns:
        At steps of a logarithmic grid: the norm of b; its distance from −rate · steps · (the first
        gradient), as a share of the latter; the largest change of any x̂ since step 0, in units of what
        rounding of u + b may do to it; the change of the loss. And the first gradient's norm.
    """
    kind = DTYPES[dtype]
    images, labels = _inputs(data)
    images, labels = images[: experiment.bias_examples].to(kind), labels[: experiment.bias_examples]
    net = mlp(images.shape[1], classes=len(data.classes), init_std=experiment.init_std, seed=seed).to(kind)
    u = (images @ net.linear1.weight.T).detach()
    readout = net.output.weight.detach()
    b = torch.zeros(u.shape[1], dtype=kind, requires_grad=True)
    record: dict[str, Any] = {name: [] for name in ("step", "bias", "off_line", "moved", "roundings", "loss")}
    points = set(log_grid(experiment.bias_steps))
    first = line = torch.zeros_like(u[0])
    x_hat_0, loss_0 = u, u.new_zeros(())
    for step in range(experiment.bias_steps + 1):
        x = u + b
        x_hat = x - x.mean(0).detach()
        deviation = x.std(0, unbiased=False).detach()
        if scales:
            x_hat = x_hat / deviation
        loss = F.cross_entropy(torch.sigmoid(x_hat) @ readout.T, labels)
        (gradient,) = torch.autograd.grad(loss, b)
        if step == 0:
            first, x_hat_0, loss_0 = gradient, x_hat.detach(), loss.detach()
        if step in points:
            line = -rate * step * first
            moved = (x_hat.detach() - x_hat_0).abs().amax(0)
            # One rounding of the largest u + b of a unit, one of its mean, twice over: now and at step 0.
            allowed = 4 * torch.finfo(kind).eps * x.detach().abs().amax(0)
            if scales:
                allowed = allowed / deviation * (1 + x_hat_0.abs().amax(0))
            record["step"].append(step)
            record["bias"].append(b.detach().norm().item())
            record["off_line"].append(((b.detach() - line).norm() / line.norm()).item() if step else 0.0)
            record["moved"].append(moved.max().item())
            record["roundings"].append((moved / allowed).max().item())
            record["loss"].append((loss.detach() - loss_0).item())
        with torch.no_grad():
            b -= rate * gradient
    advance(experiment.bias_steps)
    return {
        "scales": scales,
        "dtype": dtype,
        "rate": rate,
        "first_gradient": first.norm().item(),
        "first_loss": loss_0.item(),
        **record,
    }


def train(
    experiment: Divergence, data: ImageData, kind: str, activation: str, rate: float, seed: int
) -> dict[str, Any]:
    """One network, all of whose parameters learn by plain SGD.

    Returns:
        At steps of a logarithmic grid: the mean training loss since the one before, the norms of the
        hidden layers' biases b and weights W, all layers together, and the smallest deviation of any
        unit's W u + b over the batch. The first step at which loss or parameters were not finite
        (training ends there), and that at which weights and biases together had `GROWN`. The mean loss
        and accuracy over the last tenth of the steps, on the batches that the step learns from.
    """
    images, labels = _inputs(data)
    net = network(
        KINDS[kind],
        in_features=images.shape[1],
        classes=len(data.classes),
        activation=activation,
        init_std=experiment.init_std,
        seed=seed,
        new_weight=experiment.moving_weight,
    )
    hidden = [child for child in net if isinstance(child, nn.Linear)][:-1]
    deviations: list[Tensor] = []
    for child, after in zip(list(net)[:-1], list(net)[1:], strict=True):
        if child in hidden:
            after.register_forward_pre_hook(lambda _, x: deviations.append(x[0].detach()))
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    record: dict[str, Any] = {name: [] for name in ("step", "loss", "bias", "weight", "deviation")}
    points = set(log_grid(experiment.steps))
    at_first, grown, not_finite = _norms(hidden), None, None
    losses: list[float] = []
    right: list[float] = []
    tail = max(1, experiment.steps // 10)
    largest_bias, reported = 0.0, 0
    for step in range(experiment.steps + 1):
        chosen = batch_indices(step, experiment.batch_size, len(labels), seed)
        deviations.clear()
        logits = net(images[chosen])
        loss = F.cross_entropy(logits, labels[chosen])
        losses.append(loss.item())
        right.append((logits.argmax(1) == labels[chosen]).double().mean().item())
        bias, weight = _norms(hidden)
        largest_bias = max(largest_bias, bias)
        if grown is None and math.hypot(bias, weight) > GROWN * math.hypot(*at_first):
            grown = step
        if not math.isfinite(losses[-1] + bias + weight):
            not_finite = step
            break
        if step in points:
            record["step"].append(step)
            record["loss"].append(_mean(losses[reported:]))
            reported = len(losses)
            record["bias"].append(bias)
            record["weight"].append(weight)
            record["deviation"].append(min(x.std(0, unbiased=False).min().item() for x in deviations))
        if step < experiment.steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    advance(experiment.steps)
    return {
        "rate": rate,
        **record,
        "not_finite": not_finite,
        "grown": grown,
        "largest_bias": largest_bias,
        "growth": math.hypot(bias, weight) / math.hypot(*at_first),
        "final_loss": None if not_finite is not None else _mean(losses[-tail:]),
        "final_accuracy": None if not_finite is not None else _mean(right[-tail:]),
    }


def _inputs(data: ImageData) -> tuple[Tensor, Tensor]:
    images = to_input(torch.from_numpy(data.train_images), binarize=True).flatten(1)
    return images, torch.from_numpy(data.train_labels)


def _norms(hidden: list[nn.Linear]) -> tuple[float, float]:
    with torch.no_grad():
        bias = math.sqrt(sum(layer.bias.double().square().sum().item() for layer in hidden))
        weight = math.sqrt(sum(layer.weight.double().square().sum().item() for layer in hidden))
    return bias, weight


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def names(experiment: Divergence) -> dict[str, tuple[Divergence, str, str, str, int]]:
    """All parts by name, with the arguments of `run_part`."""
    found = {}
    for seed in range(experiment.seeds):
        found[f"bias-seed-{seed}"] = ("bias", "sigmoid", seed)
        for activation in experiment.activations:
            for kind in KINDS:
                found[f"{kind}-{activation}-seed-{seed}"] = (kind, activation, seed)
    return {name: (experiment, name, *part) for name, part in found.items()}


def num_steps(experiment: Divergence, name: str) -> int:
    """Steps that the part of this name reports."""
    if name.startswith("bias-"):
        return 2 * len(DTYPES) * len(experiment.rates) * experiment.bias_steps
    return len(experiment.rates) * experiment.steps
