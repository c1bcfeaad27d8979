"""Several copies of the paper's network in one module, so that one process trains them side by side."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.layers import BatchNorm1d
from batchnorm.models.mlp import mlp


class StackedMLP(nn.Module):
    """Copies of `mlp` that start alike, see the same examples, and never touch each other.

    They differ in what the caller does to each, such as its learning rate. The first layer of
    all copies is one matrix product, and the hidden layers are one batched product each: small
    networks trained one at a time spend much of their time in the interpreter.

    Args:
        num_copies: Networks K in the stack.
        normalize: Whether each hidden layer has BN directly before its sigmoid (and no bias,
            whose part β takes), as `batchnorm.insert` would put it.
        seed: Of the initial weights, the same in every copy.
        in_features: As in `mlp`.
        hidden: As in `mlp`.
        classes: As in `mlp`.
        init_std: As in `mlp`.

    Source: Ioffe & Szegedy (2015), section 4.1.
    """

    def __init__(
        self,
        num_copies: int,
        *,
        normalize: bool,
        seed: int,
        in_features: int = 28 * 28,
        hidden: Sequence[int] = (100, 100, 100),
        classes: int = 10,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_copies = num_copies
        one = mlp(in_features, hidden, classes, init_std=init_std, seed=seed)
        linears = [layer for layer in one if isinstance(layer, nn.Linear)]
        first = linears[0].weight.detach().T.repeat(1, num_copies)
        later = [layer.weight.detach().T.repeat(num_copies, 1, 1) for layer in linears[1:]]
        self.weights = nn.ParameterList([first, *later])  # (in, K·units), then (K, units, units)
        self.norms = nn.ModuleList(BatchNorm1d(num_copies * units) for units in hidden if normalize)
        biased = [classes] if normalize else [*hidden, classes]
        self.biases = nn.ParameterList(torch.zeros(num_copies * units) for units in biased)

    def hidden_inputs(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What enters the sigmoids of each hidden layer, and the logits.

        Args:
            x: Shape (N, in_features), seen by every copy.

        Returns:
            For each hidden layer a tensor of shape (N, K, units), and logits (N, K, classes).
        """
        biases = iter(self.biases)
        entering, h = [], x
        for layer, weight in enumerate(self.weights):
            if layer == 0:
                u = h @ weight
            else:
                per_copy = h.view(len(x), self.num_copies, -1).transpose(0, 1)
                u = torch.bmm(per_copy, weight).transpose(0, 1).reshape(len(x), -1)
            is_hidden = layer < len(self.weights) - 1
            u = self.norms[layer](u) if is_hidden and self.norms else u + next(biases)
            if is_hidden:
                entering.append(u.view(len(x), self.num_copies, -1))
                h = torch.sigmoid(u)
        return entering, u.view(len(x), self.num_copies, -1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every copy, shape (N, K, classes), for ``x`` of shape (N, in_features)."""
        return self.hidden_inputs(x)[1]

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of every copy, shape (K,).

        Copies share no parameter, so ``losses(x, labels).backward(rates)`` followed by a step of SGD
        at rate 1 trains each copy at its own rate.

        Args:
            x: Shape (N, in_features).
            labels: Class indices, shape (N,).
        """
        logits = self(x).flatten(0, 1)
        each = F.cross_entropy(logits, labels.repeat_interleave(self.num_copies), reduction="none")
        return each.view(len(x), self.num_copies).mean(0)
