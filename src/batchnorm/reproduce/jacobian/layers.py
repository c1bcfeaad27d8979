"""Jacobians between the inputs of consecutive nonlinearities, exact and in float64.

Shapes: B examples, L hidden layers, U units each, M = B·U. What enters the nonlinearity of layer l is
y_l = γ x̂_l + β under BN, x̂_l being W_l h_{l−1} normalized by the batch, and y_l = x̂_l = W_l h_{l−1} + b_l
without.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.models import mlp
from batchnorm.models.mlp import ACTIVATIONS
from batchnorm.moments import Moments
from batchnorm.surgery import insert

DERIVATIVES: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.Sigmoid: lambda y: torch.sigmoid(y) * (1 - torch.sigmoid(y)),
    nn.ReLU: lambda y: (y > 0).to(y.dtype),
}


@dataclass(frozen=True)
class Hidden:
    """One hidden layer as a batch passes, all in float64."""

    x_hat: Tensor
    """(B, U): normalized, or W h + b without BN."""
    y: Tensor
    """(B, U): what enters the nonlinearity."""
    slope: Tensor
    """(B, U): γ g′(y), the derivative of the layer's output in x̂."""
    weight: Tensor
    """(U, inputs)."""
    inverse: Tensor
    """(U,): 1/sqrt(σ² + eps); ones without BN."""
    normalized: bool
    """Whether there is BN, so that examples meet in its statistics."""


def network(
    *,
    in_features: int,
    depth: int,
    classes: int,
    activation: str,
    normalize: bool,
    init_std: float,
    seed: int,
) -> nn.Module:
    """`mlp` with ``depth`` hidden layers of 100, with BN before each nonlinearity where ``normalize``."""
    hidden = (100,) * depth
    net: nn.Module = mlp(in_features, hidden, classes, activation=activation, init_std=init_std, seed=seed)
    return insert(net, torch.zeros(2, in_features))[0] if normalize else net


@torch.no_grad()
def trace(net: nn.Module, images: Tensor) -> list[Hidden]:
    """All hidden layers of a `network` in training mode, normalized by the moments of these images.

    The network passes in float64, and its running statistics do not move.
    """
    found: list[Hidden] = []
    h = images.flatten(1).double()
    linear, norm = None, None
    for module in _in_order(net):
        if isinstance(module, nn.Linear):
            linear = module
            z = nn.functional.linear(
                h, linear.weight.double(), None if linear.bias is None else linear.bias.double()
            )
        elif isinstance(module, _BatchNorm):
            norm = module
        elif type(module) in DERIVATIVES:
            assert linear is not None
            ones = torch.ones(z.shape[1], dtype=torch.float64)
            x_hat, inverse, gamma, y = z, ones, ones, z
            if norm is not None:
                moments = Moments.of(z)
                inverse, gamma = (moments.var + norm.eps).rsqrt(), norm.weight.double()
                x_hat = (z - moments.mean) * inverse
                y = gamma * x_hat + norm.bias.double()
            slope = gamma * DERIVATIVES[type(module)](y)
            found.append(Hidden(x_hat, y, slope, linear.weight.double(), inverse, norm is not None))
            h, norm = module(y), None
    return found


def of_examples(before: Hidden, after: Hidden, examples: int) -> Tensor:
    """∂x̂_l/∂x̂_{l−1} of single examples, the statistics held fixed; (examples, U, U).

    J_i = diag(1/sqrt(σ² + eps)) W diag(γ g′(y_i)): the map F of the paper's conjecture, which takes one
    normalized vector to the next and whose statistics are the population's.
    """
    return after.inverse[:, None] * after.weight * before.slope[:examples, None, :]


def of_batch(before: Hidden, after: Hidden) -> Tensor:
    """∂x̂_l/∂x̂_{l−1} of the batch as one vector, through its statistics; (M, M), rows and columns by example.

    For each unit, the batch's Jacobian of the normalization takes out of what the examples do by themselves
    the common shift and the stretch along x̂: I − 11ᵀ/B − x̂x̂ᵀ/B. Without BN examples do not meet.
    """
    each = of_examples(before, after, len(before.x_hat))
    num, out, units = each.shape
    if not after.normalized:
        return torch.block_diag(*each)
    meet = torch.eye(num, dtype=torch.float64).expand(out, num, num) - 1 / num
    meet = meet - after.x_hat.T[:, :, None] * after.x_hat.T[:, None, :] / num
    whole = torch.einsum("kab,bkj->akbj", meet, each)
    return whole.reshape(num * out, num * units)


def gradients(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, list[float], list[float]]:
    """Loss, and norms of its gradients in each x̂_l (of all examples together) and in each W_l.

    The network passes as it is, in float32; running statistics move.
    """
    entering: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda _, given: _keep(entering, given[0]))
        for module in net.modules()
        if type(module) in DERIVATIVES
    ]
    net.zero_grad()
    loss = nn.functional.cross_entropy(net(images.flatten(1)), labels)
    loss.backward()
    for handle in handles:
        handle.remove()
    gammas = [module.weight.detach() for module in net.modules() if isinstance(module, _BatchNorm)]
    factors = gammas or [torch.ones(())] * len(entering)
    inside = [
        (y.grad.double() * gamma.double()).norm().item() for y, gamma in zip(entering, factors, strict=True)
    ]
    linears = [module for module in net.modules() if isinstance(module, nn.Linear)][:-1]
    return loss.item(), inside, [layer.weight.grad.double().norm().item() for layer in linears]


def growth_at_start(activation: str) -> float:
    """By how much a gradient grows, a layer back, in a wide network of independent weights under BN.

    sqrt(E[g′(x)²] / Var[g(x)]) for standard Gaussian x: W spreads g's variance over σ², which BN divides
    by. It is at least 1 for every g, and 1 for straight lines only (the Poincaré inequality of the
    Gaussian); sqrt(π/(π − 1)) = 1.211 for ReLU. Source: Yang et al. (2019), A Mean Field Theory of Batch
    Normalization, for ReLU.
    """
    x = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)
    density /= density.sum()
    module = ACTIVATIONS[activation]()
    value, slope = module(x), DERIVATIVES[type(module)](x)
    mean = (density * value).sum()
    return ((density * slope**2).sum() / (density * (value - mean) ** 2).sum()).sqrt().item()


def _keep(entering: list[Tensor], y: Tensor) -> None:
    y.retain_grad()
    entering.append(y)


def _in_order(net: nn.Module) -> list[nn.Module]:
    """The modules without children, in the order in which a chain of layers passes them."""
    return [module for module in net.modules() if not list(module.children())]
