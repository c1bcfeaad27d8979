"""One step of an LSTM and of a GRU whose products are batch-normalized."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from batchnorm.layers.recurrent.stepwise import StepwiseBatchNorm

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
