"""LSTM and GRU cells whose products are batch-normalized, step by step."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.layers.base import _stay_whole
from batchnorm.layers.stepwise import StepwiseBatchNorm, check_first_batch, placed

LSTM_NORMS = {"ih": (4, False), "hh": (4, False), "c": (1, True)}
"""Normalizations of an LSTM: features, in hidden sizes, and whether there is a β."""

GRU_NORMS = {"ih": (3, False), "hh": (3, False)}
"""The same of a GRU."""

Norms = Mapping[str, StepwiseBatchNorm]


def make_norms(
    kinds: Mapping[str, tuple[int, bool]], hidden_size: int, max_length: int, **options: Any
) -> dict[str, StepwiseBatchNorm]:
    """The normalizations of one cell, by the ending of what they normalize."""
    return {
        kind: StepwiseBatchNorm(times * hidden_size, max_length, bias=bias, **options)
        for kind, (times, bias) in kinds.items()
    }


def gate_biases(
    weight: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None, *, joined: bool
) -> tuple[Tensor, Tensor | None]:
    """What is added to the normalized products of the input and of the state.

    Args:
        weight: Of a product, for shape, dtype and device.
        bias_ih: Or ``None``.
        bias_hh: Or ``None``.
        joined: Whether both act at one place, as in an LSTM.
    """
    if bias_ih is None or bias_hh is None:
        return weight.new_zeros(weight.shape[0]), None
    return (bias_ih + bias_hh, None) if joined else (bias_ih, bias_hh)


def lstm_step(
    gates: Tensor,
    state: tuple[Tensor, ...],
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    norms: Norms,
    step: int,
) -> tuple[Tensor, ...]:
    """One step of an LSTM; the biases are in ``gates`` already.

    Args:
        gates: Normalized product of the input, with the biases, shape (N, 4 H): input gate,
            forget gate, candidate, output gate, as torch orders them.
        state: h and c, shape (N, H).
        weight_hh: Shape (4 H, H).
        bias_hh: Of no account: part of ``gates``.
        norms: As of `LSTM_NORMS`.
        step: The time step.

    Returns:
        The next h and c.
    """
    h, c = state
    gates = norms["hh"](F.linear(h, weight_hh), step, gates)
    i, f, g, o = gates.chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * norms["c"](c, step, activation="tanh"), c


def gru_step(
    gates: Tensor,
    state: tuple[Tensor, ...],
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    norms: Norms,
    step: int,
) -> tuple[Tensor, ...]:
    """One step of a GRU.

    Args:
        gates: Normalized product of the input, with its bias, shape (N, 3 H): reset gate, update
            gate, candidate, as torch orders them.
        state: h, shape (N, H).
        weight_hh: Shape (3 H, H).
        bias_hh: Shape (3 H,), or ``None``; that of the candidate is inside the reset gate's reach.
        norms: As of `GRU_NORMS`.
        step: The time step.

    Returns:
        The next h.
    """
    (h,) = state
    product = F.linear(h, weight_hh)
    bias = None if bias_hh is None else bias_hh.to(product.dtype).expand(product.shape)
    r_x, z_x, n_x = gates.chunk(3, 1)
    r_h, z_h, n_h = norms["hh"](product, step, bias).chunk(3, 1)
    n = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
    return (n + (z_x + z_h).sigmoid() * (h - n),)


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

    def forward(
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
            return _stay_whole(self, input, hx=hx, step=step)
        with placed(self):
            h, c = self._advance(input, hx, step)
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

    def forward(self, input: Tensor, hx: Tensor | None = None, *, step: int) -> Tensor:
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
            return _stay_whole(self, input, hx=hx, step=step)
        with placed(self):
            (h,) = self._advance(input, None if hx is None else (hx,), step)
        return h
