"""LSTM and GRU cells whose products are batch-normalized, step by step."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.layers.base import stay_whole
from batchnorm.layers.recurrent.steps import (
    GRU_NORMS,
    LSTM_NORMS,
    gate_biases,
    gru_step,
    lstm_step,
    make_norms,
)
from batchnorm.layers.recurrent.stepwise import check_first_batch, placed


class _Cell(nn.RNNCellBase):
    """What both cells share."""

    kinds: Mapping[str, tuple[int, bool]]
    step: Any

    def _add_norms(self, max_length: int, options: dict[str, Any]) -> None:
        self.max_length = max_length
        for kind, norm in make_norms(self.kinds, self.hidden_size, max_length, **options).items():
            self.add_module(f"norm_{kind}", norm)

    def _advance(self, x: Tensor, state: tuple[Tensor, ...] | None, step: int) -> tuple[Tensor, ...]:
        if x.dim() != 2 or x.shape[1] != self.input_size:
            raise ValueError(
                f"expected input of shape (N, {self.input_size}), a batch of one time step, "
                f"got {tuple(x.shape)}"
            )
        expected = (x.shape[0], self.hidden_size)
        if state is None:
            state = (x.new_zeros(expected),) * (2 if "c" in self.kinds else 1)
        for one in state:
            if tuple(one.shape) != expected:
                raise ValueError(f"expected a state of shape {expected}, got {tuple(one.shape)}")
        check_first_batch(self, x.shape[0], step)
        norms = {kind: getattr(self, f"norm_{kind}") for kind in self.kinds}
        joined = "c" in self.kinds
        bias, bias_hh = gate_biases(self.weight_ih, self.bias_ih, self.bias_hh, joined=joined)
        product = F.linear(x, self.weight_ih)
        gates = norms["ih"](product, step, bias.to(product.dtype).expand(product.shape))
        return type(self).step(gates, state, self.weight_hh, bias_hh, norms, step)

    def reset_parameters(self) -> None:
        """Weights and biases as torch draws them; γ, β and statistics as at the start."""
        nn.RNNCellBase.reset_parameters(self)
        for norm in self.children():
            norm.reset_parameters()

    def extra_repr(self) -> str:
        """What `repr` shows of the settings."""
        return f"{super().extra_repr()}, max_length={self.max_length}"


class BatchNormLSTMCell(_Cell, nn.LSTMCell):
    """`torch.nn.LSTMCell` with batch-normalized products and cell state.

    Weights and biases are named and laid out as torch's. See `BatchNormLSTM` for what is
    normalized, and for sequences: it multiplies the input of all steps at once.

    Args:
        input_size: Features of the input.
        hidden_size: H.
        max_length: Time steps with statistics of their own; later ones share the last's.
        bias: Whether the gates have biases.
        eps: Added to variances.
        momentum: Weight of the newest batch in the running statistics; ``None`` averages all equally.
        gamma: Initial γ.
        device: Of parameters and buffers.
        dtype: Of parameters; running statistics stay in float32 or wider.

    Raises:
        ValueError: As of `StepwiseBatchNorm`.

    Source: Cooijmans et al. (2017), *Recurrent Batch Normalization*, equations 6 to 8.
    """

    kinds = LSTM_NORMS
    step = staticmethod(lstm_step)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        max_length: int,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        nn.LSTMCell.__init__(self, input_size, hidden_size, bias, **factory)
        self._add_norms(max_length, {"eps": eps, "momentum": momentum, "gamma": gamma, **factory})

    def forward(  # type: ignore[override]  # the step has to be said
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None, *, step: int
    ) -> tuple[Tensor, Tensor]:
        """The next state.

        Args:
            input: Shape (N, input_size).
            hx: h and c, shape (N, H) each; zeros when ``None``.
            step: The time step, from 0: whose statistics are used.

        Returns:
            The next h and c.

        Raises:
            ValueError: A shape does not fit, ``step`` is negative, or a batch of one in training at
                step 0.
        """
        if isinstance(input, torch.fx.Proxy):
            return stay_whole(self, input, hx=hx, step=step)
        try:
            h, c = self._advance(input, hx, step)
        except (ValueError, TypeError) as error:
            raise placed(self, error) from None
        return h, c


class BatchNormGRUCell(_Cell, nn.GRUCell):
    """`torch.nn.GRUCell` with batch-normalized products.

    Weights and biases are named and laid out as torch's. See `BatchNormGRU` for what is
    normalized, and for sequences.

    Args:
        input_size: Features of the input.
        hidden_size: H.
        max_length: As of `BatchNormLSTMCell`; so are the others.

    Raises:
        ValueError: As of `StepwiseBatchNorm`.

    Source: Cooijmans et al. (2017), transferred as in `BatchNormGRU`.
    """

    kinds = GRU_NORMS
    step = staticmethod(gru_step)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        max_length: int,
        bias: bool = True,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        nn.GRUCell.__init__(self, input_size, hidden_size, bias, **factory)
        self._add_norms(max_length, {"eps": eps, "momentum": momentum, "gamma": gamma, **factory})

    def forward(  # type: ignore[override]  # the step has to be said
        self, input: Tensor, hx: Tensor | None = None, *, step: int
    ) -> Tensor:
        """The next state.

        Args:
            input: Shape (N, input_size).
            hx: h, shape (N, H); zeros when ``None``.
            step: The time step, from 0: whose statistics are used.

        Returns:
            The next h.

        Raises:
            ValueError: As `BatchNormLSTMCell`.
        """
        if isinstance(input, torch.fx.Proxy):
            return stay_whole(self, input, hx=hx, step=step)
        try:
            (h,) = self._advance(input, None if hx is None else (hx,), step)
        except (ValueError, TypeError) as error:
            raise placed(self, error) from None
        return h
