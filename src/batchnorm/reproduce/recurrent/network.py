"""The network: an LSTM that reads a sequence, and a classifier of its last state."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.data import ImageData, to_input
from batchnorm.layers import BatchNormLSTM


class Reader(nn.Module):
    """An LSTM and a linear classifier of its last hidden state.

    Args:
        in_features: Of a time step.
        length: Time steps.
        hidden_size: H.
        classes: Outputs.
        gamma: Initial γ; ``None`` for a plain LSTM.
        seed: Of the initial weights: a plain network's and a batch-normalized one's are the same.
    """

    def __init__(
        self, in_features: int, length: int, hidden_size: int, classes: int, gamma: float | None, seed: int
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.lstm: nn.RNNBase = (
                nn.LSTM(in_features, hidden_size)
                if gamma is None
                else BatchNormLSTM(in_features, hidden_size, length, gamma=gamma)
            )
            for gate in self.lstm.weight_hh_l0.detach().chunk(4):
                nn.init.orthogonal_(gate)
            self.classify = nn.Linear(hidden_size, classes)
        with torch.no_grad():
            for bias in (self.lstm.bias_ih_l0, self.lstm.bias_hh_l0):
                bias.zero_()
            # The forget gate's, so that a plain LSTM remembers from the start.
            self.lstm.bias_ih_l0[hidden_size : 2 * hidden_size] = 1.0

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Logits.

        Args:
            x: Shape (T, N, F).
            state: Initial h and c; zeros when ``None``.
        """
        _, (h, _) = self.lstm(x, state)
        return self.classify(h[0])


def initial_state(
    num: int, hidden_size: int, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A noisy hidden state and a cell state of zeros."""
    h = noise * torch.randn(1, num, hidden_size, generator=generator)
    return h, torch.zeros_like(h)


def sequences(data: ImageData, part: str, task: str, pixel_side: int) -> Tensor:
    """Images as sequences, shape (T, N, F), grey levels from 0 to 1.

    Args:
        data: Grey images.
        part: "train" or "test".
        task: "rows" or "pixels".
        pixel_side: As of the experiment.

    Raises:
        ValueError: Images are in colour, or their sides are no multiple of ``pixel_side``.
    """
    images = to_input(torch.from_numpy(getattr(data, f"{part}_images")))
    if images.dim() != 3:
        raise ValueError(f"{data.name} is in colour; grey images are needed, such as mnist's")
    if task == "rows":
        return images.permute(1, 0, 2).contiguous()
    height, width = images.shape[1:]
    if max(height, width) > pixel_side:
        if height % pixel_side or width % pixel_side:
            raise ValueError(f"pixel_side {pixel_side} does not divide images of {height} by {width}")
        images = F.avg_pool2d(images[:, None], (height // pixel_side, width // pixel_side))[:, 0]
    return images.flatten(1).t().unsqueeze(2).contiguous()


def gradients_through_time(
    net: Reader, x: Tensor, labels: Tensor, state: tuple[Tensor, Tensor]
) -> tuple[float, list[float]]:
    """The loss of a batch, and the norm of its gradient in the hidden state of every time step.

    Of a network in training mode, whose running statistics move: give a copy.

    Args:
        net: Fed step by step.
        x: Shape (T, N, F).
        labels: Shape (N,).
        state: Initial h and c.
    """
    hidden = []
    for step, one in enumerate(x):
        options: dict[str, Any] = {"first_step": step} if isinstance(net.lstm, BatchNormLSTM) else {}
        _, state = net.lstm(one[None], state, **options)
        hidden.append(state[0])
    loss = F.cross_entropy(net.classify(hidden[-1][0]), labels)
    return loss.item(), [g.norm().item() for g in torch.autograd.grad(loss, hidden)]
