"""Normalizations whose statistics may stand outside the gradient."""

import torch
from torch import Tensor, nn

from batchnorm.functional import normalize_with
from batchnorm.layers import BatchNorm1d
from batchnorm.models import mlp
from batchnorm.moments import Moments
from batchnorm.reproduce.divergence.experiment import Kind


class Normalize(nn.Module):
    """Subtracts the mean of the batch, and divides by its deviation where the `Kind` says so.

    Args:
        num_features: Columns of the input, shape (N, num_features).
        kind: What is normalized, and whether the gradient goes through it.
        eps: Added to the variance.
        new_weight: Weight of the newest batch in moving averages, which start at 0 and 1.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, num_features: int, kind: Kind, eps: float = 1e-5, new_weight: float = 0.1) -> None:
        super().__init__()
        self.kind, self.eps, self.new_weight = kind, eps, new_weight
        self.weight = nn.Parameter(torch.ones(num_features)) if kind.affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if kind.affine else None
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """The transform of ``x`` (N, C) by the moments of its columns, or by their moving averages."""
        if self.kind.inside:
            # Without scaling, the mean alone: through plain operations, so that the gradient sees it.
            return x - x.mean(0)
        moments = Moments.of(x.detach())
        mean, var = moments.mean, moments.var
        if self.kind.moving:
            mean = self.mean = self.mean + self.new_weight * (mean - self.mean)
            var = self.var = self.var + self.new_weight * (var - self.var)
        if not self.kind.scales:
            return x - mean
        return normalize_with(x, mean, var, self.weight, self.bias, eps=self.eps)


def network(
    kind: Kind,
    *,
    in_features: int,
    classes: int,
    activation: str,
    init_std: float,
    seed: int,
    new_weight: float,
) -> nn.Sequential:
    """`mlp` with a normalization between each layer's W u + b and its nonlinearity; biases stay.

    Args:
        kind: Which; Algorithm 1 is `BatchNorm1d`.
        in_features: As in `mlp`; so are classes, activation, init_std and seed.
        classes: Outputs.
        activation: Name of the nonlinearity.
        init_std: Deviation of the weights.
        seed: Of the weights.
        new_weight: As in `Normalize`.
    """
    plain = mlp(in_features, classes=classes, activation=activation, init_std=init_std, seed=seed)
    children: list[nn.Module] = []
    for name, child in plain.named_children():
        children.append(child)
        if name.startswith("linear"):
            assert isinstance(child, nn.Linear)
            algorithm_1 = kind.inside and kind.scales
            width = child.out_features
            children.append(
                BatchNorm1d(width) if algorithm_1 else Normalize(width, kind, new_weight=new_weight)
            )
    return nn.Sequential(*children)
