"""LSTM and GRU layers whose products are batch-normalized, with statistics of each time step."""

from typing import overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from batchnorm.layers.base import stay_whole
from batchnorm.layers.recurrent.base import Recurrent
from batchnorm.layers.recurrent.steps import GRU_NORMS, LSTM_NORMS, gru_step, lstm_step
from batchnorm.layers.recurrent.stepwise import placed


class BatchNormLSTM(Recurrent):
    """`torch.nn.LSTM` with batch-normalized products and cell state: statistics of each time step.

    Of every gate, ``BN(W_ih x; γ_x) + BN(W_hh h; γ_h) + b``; the output is
    ``σ(o) · tanh(BN(c; γ_c, β_c))``, while the cell state itself goes on as it is. Weights and biases
    are named and laid out as torch's, so that either loads the other's with ``strict=False``.

    Args:
        input_size: Features of the input.
        hidden_size: H.
        max_length: Time steps with statistics of their own; later ones share the last's. Take the
            length of the training sequences, or some hundred.
        num_layers: Layers, one above the other.
        bias: Whether the gates have biases.
        batch_first: Whether tensors are (N, T, F), instead of (T, N, F).
        dropout: Probability with which a feature between layers is dropped in training.
        bidirectional: Whether a second LSTM goes through each sequence from its end; its time steps
            count from there.
        eps: Added to variances.
        momentum: Weight of the newest batch in the running statistics; ``None`` averages all equally.
        gamma: Initial γ: 1 would saturate the gates, and their gradients would vanish.
        device: Of parameters and buffers.
        dtype: Of parameters; running statistics stay in float32 or wider.

    Raises:
        ValueError: ``max_length`` is less than 1, ``gamma`` not positive, ``eps`` negative, or as of
            `torch.nn.LSTM`. Projections (``proj_size``) do not exist here.

    Source: Cooijmans et al. (2017), *Recurrent Batch Normalization*, arXiv 1603.09025, section 3.
    """

    kinds = LSTM_NORMS
    step = staticmethod(lstm_step)

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        first_step: int = 0,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, first_step: int = 0
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        first_step: int = 0,
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """All hidden states of the last layer, and the final state.

        In training every step is normalized by the sequences that are alive at it, in evaluation by
        running statistics. Padding has no part in statistics, gradients and states; the final state
        of a sequence is that of its own last step. A sequence of no steps keeps its initial state.

        Args:
            input: Shape (T, N, F), or (N, T, F) with ``batch_first``; (T, F) is one sequence; or a
                `torch.nn.utils.rnn.PackedSequence`.
            hx: h and c, shape (layers · directions, N, H) each, or without N for one sequence; zeros
                when ``None``.
            mask: Boolean, the shape of a padded ``input`` without its features; true for the steps of
                a sequence, false after its end.
            first_step: The time step that the input begins with, where a sequence goes on: whose
                statistics are used.

        Returns:
            The outputs, as ``input`` came, (…, directions · H), zeros where ``mask`` is false; and
            h and c, as ``hx``.

        Raises:
            ValueError: A shape does not fit, ``mask`` is true again after it was false, or one
                sequence alone in training.
            TypeError: ``input`` is not floating point.
        """
        if isinstance(input, torch.fx.Proxy):
            return stay_whole(self, input, hx=hx, mask=mask, first_step=first_step)
        try:
            output, (h, c) = self.sequences(input, hx, mask, first_step)
        except (ValueError, TypeError) as error:
            raise placed(self, error) from None
        return output, (h, c)


class BatchNormGRU(Recurrent):
    """`torch.nn.GRU` with batch-normalized products: statistics of each time step.

    Reset and update gate are ``σ(BN(W_ih x; γ_x) + b_ih + BN(W_hh h; γ_h) + b_hh)``, the candidate is
    ``tanh(BN(W_in x; γ_x) + b_in + r · (BN(W_hn h; γ_h) + b_hn))``. The state, a mean of states and
    candidates that stays between −1 and 1, goes on and out as it is. Weights and biases are named and
    laid out as torch's, so that either loads the other's with ``strict=False``.

    Args:
        input_size: Features of the input.
        hidden_size: H.
        max_length: As of `BatchNormLSTM`; so are the others.

    Raises:
        ValueError: As of `BatchNormLSTM`.

    Source: Cooijmans et al. (2017), whose rule for products this transfers to the GRU; Ba, Kiros &
    Hinton (2016), *Layer Normalization*, place theirs so.
    """

    kinds = GRU_NORMS
    step = staticmethod(gru_step)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, *, mask: Tensor | None = None, first_step: int = 0
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, *, first_step: int = 0
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        first_step: int = 0,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """All hidden states of the last layer, and the final state.

        Args:
            input: As in `BatchNormLSTM.forward`.
            hx: h, shape (layers · directions, N, H), or without N for one sequence; zeros when ``None``.
            mask: As in `BatchNormLSTM.forward`; so is ``first_step``.

        Returns:
            The outputs, as ``input`` came, (…, directions · H), zeros where ``mask`` is false; and
            h, as ``hx``.

        Raises:
            ValueError: As `BatchNormLSTM.forward`; so does ``TypeError``.
        """
        if isinstance(input, torch.fx.Proxy):
            return stay_whole(self, input, hx=hx, mask=mask, first_step=first_step)
        try:
            output, (h,) = self.sequences(input, None if hx is None else (hx,), mask, first_step)
        except (ValueError, TypeError) as error:
            raise placed(self, error) from None
        return output, h
