"""What recurrent layers share: how sequences come in, go through, and come out."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from batchnorm.layers.recurrent import sequences
from batchnorm.layers.recurrent.sequences import Steps
from batchnorm.layers.recurrent.steps import Norms, gate_biases, make_norms
from batchnorm.layers.recurrent.stepwise import StepwiseBatchNorm, check_first_batch

State = tuple[Tensor, ...]


class Recurrent(nn.RNNBase):
    """What both layers share: how sequences come in, go through, and come out."""

    kinds: Mapping[str, tuple[int, bool]]
    step: Callable[..., State]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        max_length: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        gamma: float = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not a subclass of torch's LSTM or GRU, which torch.compile refuses to look into.
        super().__init__(
            "LSTM" if "c" in self.kinds else "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.max_length = max_length
        options: dict[str, Any] = {
            "eps": eps, "momentum": momentum, "gamma": gamma, "device": device, "dtype": dtype,
        }  # fmt: skip
        for suffix in self._suffixes():
            for kind, norm in make_norms(self.kinds, hidden_size, max_length, **options).items():
                self.add_module(f"norm_{kind}{suffix}", norm)

    def _suffixes(self) -> list[str]:
        """Endings of the parameters' names, a direction of a layer each, as torch has them."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def reset_parameters(self) -> None:
        """Weights and biases as torch draws them; γ, β and statistics as at the start."""
        bound = self.hidden_size**-0.5 if self.hidden_size else 0.0
        for parameter in self._parameters.values():
            nn.init.uniform_(parameter, -bound, bound)
        for norm in self.children():
            norm.reset_parameters()

    def sequences(
        self, given: Tensor | PackedSequence, state: State | None, mask: Tensor | None, first_step: int
    ) -> tuple[Tensor | PackedSequence, State]:
        """Outputs and final state of sequences in any form; arguments as of `BatchNormLSTM.forward`."""
        if first_step < 0:
            raise ValueError(f"first_step, the time step the input begins with, is 0 or more: {first_step}")
        if isinstance(given, PackedSequence):
            if mask is not None:
                raise ValueError("a PackedSequence knows its lengths: give no mask beside it")
            self._check_features(given.data)
            steps = sequences.of_packed(given)
            state = self._checked(state, steps)
            state = _chosen(state, given.sorted_indices)
            data, state = self._layers(steps, state, first_step)
            packed = PackedSequence(data, given.batch_sizes, given.sorted_indices, given.unsorted_indices)
            return packed, _chosen(state, given.unsorted_indices)
        if given.dim() == 2:
            if mask is not None:
                raise ValueError("one sequence without a batch dimension needs no mask: cut it to its length")
            self._check_features(given)
            wide = None if state is None else tuple(one.unsqueeze(1) for one in state)
            steps = sequences.of_even(given.unsqueeze(1))
            data, ended = self._layers(steps, self._checked(wide, steps), first_step)
            return data, tuple(one.squeeze(1) for one in ended)
        if given.dim() != 3:
            raise ValueError(f"expected a batch of sequences, 3-d (or 2-d: one), got {tuple(given.shape)}")
        self._check_features(given)
        if mask is not None:
            sequences.check_mask(mask, tuple(given.shape[:2]), time_dim=1 if self.batch_first else 0)
        if self.batch_first:
            given, mask = given.transpose(0, 1), None if mask is None else mask.t()
        if mask is None:
            steps = sequences.of_even(given)
            data, ended = self._layers(steps, self._checked(state, steps), first_step)
            output = data.unflatten(0, tuple(given.shape[:2]))
        else:
            steps, order = sequences.of_masked(given, mask)
            data, ended = self._layers(steps, _chosen(self._checked(state, steps), order), first_step)
            output, ended = sequences.to_padded(steps, data, mask, order), _chosen(ended, order.argsort())
        return output.transpose(0, 1) if self.batch_first else output, ended

    def _layers(self, steps: Steps, state: State, first_step: int) -> tuple[Tensor, State]:
        """All layers and directions; state as torch has it, (layers · directions, N, H)."""
        check_first_batch(self, steps.sizes[0] if steps.sizes else 0, first_step)
        # Reversed within each sequence, so that both directions start with all of them, at step 0.
        order = steps.reversal() if self.bidirectional else None
        data, ended, outputs = steps.data, [], []
        for index, suffix in enumerate(self._suffixes()):
            turns = suffix.endswith("_reverse")
            given = steps.turned(data, order) if turns else data
            begun = tuple(one[index] for one in state)
            output, last = self._through(given, steps.sizes, begun, suffix, first_step)
            outputs.append(steps.turned(output, order) if turns else output)
            ended.append(last)
            if len(outputs) == (2 if self.bidirectional else 1):
                data, outputs = torch.cat(outputs, 1) if self.bidirectional else outputs[0], []
                if self.dropout and index + 1 < len(self._suffixes()):
                    data = F.dropout(data, self.dropout, self.training)
        return data, tuple(torch.stack(one) for one in zip(*ended, strict=True))

    def _through(
        self, data: Tensor, sizes: list[int], state: State, suffix: str, first_step: int
    ) -> tuple[Tensor, State]:
        """One direction of one layer: the input's product at once, the state's step by step."""
        norms: dict[str, StepwiseBatchNorm] = {k: getattr(self, f"norm_{k}{suffix}") for k in self.kinds}
        with ExitStack() as stack:
            if first_step + len(sizes) > self.max_length:
                for norm in norms.values():
                    stack.enter_context(norm.together(first_step + len(sizes)))
            return self._loop(data, sizes, state, suffix, first_step, norms)

    def _loop(
        self, data: Tensor, sizes: list[int], state: State, suffix: str, first_step: int, norms: Norms
    ) -> tuple[Tensor, State]:
        weight_ih, weight_hh = (getattr(self, f"weight_{kind}{suffix}") for kind in ("ih", "hh"))
        biases = [getattr(self, f"bias_{kind}{suffix}") if self.bias else None for kind in ("ih", "hh")]
        bias, bias_hh = gate_biases(weight_ih, biases[0], biases[1], joined="c" in self.kinds)
        products = F.linear(data, weight_ih)
        bias = bias.to(products.dtype)
        # Those of no steps at all never begin.
        alive = sizes[0] if sizes else 0
        finished, outputs = [tuple(one[alive:] for one in state)], []
        state = tuple(one[:alive] for one in state)
        for step, product in enumerate(products.split(sizes), first_step):
            if product.shape[0] < alive:
                alive = product.shape[0]
                finished.append(tuple(one[alive:] for one in state))
                state = tuple(one[:alive] for one in state)
            # Step by step: while a step's product is in the cache, its normalization is nearly free.
            gates = norms["ih"](product, step, bias.expand(product.shape))
            state = type(self).step(gates, state, weight_hh, bias_hh, norms, step)
            outputs.append(state[0])
        finished.append(state)
        # The longest finish last and come first.
        state = tuple(torch.cat(parts) for parts in zip(*reversed(finished), strict=True))
        output = torch.cat(outputs) if outputs else products.new_zeros(0, self.hidden_size)
        return output, state

    def _check_features(self, data: Tensor) -> None:
        if data.shape[-1] != self.input_size:
            raise ValueError(f"expected {self.input_size} features, last, got input {tuple(data.shape)}")

    def _checked(self, state: State | None, steps: Steps) -> State:
        """The initial state, or zeros."""
        expected = (len(self._suffixes()), steps.num_sequences, self.hidden_size)
        if state is None:
            return (steps.data.new_zeros(expected),) * (2 if "c" in self.kinds else 1)
        for one in state:
            if tuple(one.shape) != expected:
                raise ValueError(
                    f"expected a state of shape {expected}, (layers · directions, sequences, hidden_size), "
                    f"got {tuple(one.shape)}"
                )
        return state

    def extra_repr(self) -> str:
        """What `repr` shows of the settings."""
        return f"{super().extra_repr()}, max_length={self.max_length}"


def _chosen(state: State, indices: Tensor | None) -> State:
    return state if indices is None else tuple(one.index_select(1, indices) for one in state)
