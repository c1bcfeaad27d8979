"""Recurrent layers beside torch's, and beside a loop over cells."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from batchnorm.bench.timing import in_turns, process
from batchnorm.layers import (
    BatchNorm1d,
    BatchNormGRU,
    BatchNormGRUCell,
    BatchNormLSTM,
    BatchNormLSTMCell,
    StepwiseBatchNorm,
)

Case = Literal["rows", "pixels", "wide"]
CASES: tuple[Case, ...] = get_args(Case)
SHAPES: dict[Case, tuple[int, int, int, int]] = {
    "rows": (28, 64, 28, 100),
    "pixels": (196, 64, 1, 100),
    "wide": (50, 64, 128, 256),
}
"""Time steps, sequences, features, hidden size."""
_KINDS: dict[str, tuple[type, type, type]] = {
    "LSTM": (BatchNormLSTM, nn.LSTM, BatchNormLSTMCell),
    "GRU": (BatchNormGRU, nn.GRU, BatchNormGRUCell),
}


def measure(
    *,
    cases: Sequence[Case] = CASES,
    rounds: int = 9,
    threads: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time forward and backward of a layer in training.

    Args:
        cases: Of `SHAPES`, each in a process of its own.
        rounds: Samples of each contender; all take turns in each round.
        threads: PyTorch's threads.
        progress: Told what is going on.

    Returns:
        For each case and kind, ``seconds`` of a forward and a backward pass of each contender (median and
        quartiles) and its ``ratio`` to torch's layer, of medians: our layer, torch's, and a loop over our
        cell, which multiplies the input step by step. For the normalization of the input's products alone
        the same under the kind "input": step by step as in our layer, and all steps in one call, of which
        the ratio is to the former.
    """
    found = []
    for case in cases:
        progress(f"{case}: T, N, F, H = {SHAPES[case]}")
        with process("default", threads) as fresh:
            found += fresh.submit(_measure, case, rounds).result()
    return found


def _measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    length, num, features, hidden = SHAPES[case]
    x, gradient = torch.randn(length, num, features), torch.randn(length, num, hidden)
    found = []
    for kind, (ours, theirs, cell) in _KINDS.items():
        contenders = {
            f"BatchNorm{kind}": ours(features, hidden, length),
            f"torch.nn.{kind}": theirs(features, hidden),
            "loop over cells": _Loop(cell(features, hidden, length)),
        }
        calls = {name: _pass(module, x, gradient) for name, module in contenders.items()}
        found.append(_row(case, kind, calls, f"torch.nn.{kind}", rounds))
    return [*found, _row(case, "input", _input_calls(length, num, 4 * hidden), "step by step", rounds)]


def _row(
    case: Case, kind: str, calls: Mapping[str, Callable[[], object]], rival: str, rounds: int
) -> dict[str, Any]:
    timings = in_turns(calls, rounds=rounds)
    return {
        "case": f"{case}, {kind}, T, N, F, H = {', '.join(map(str, SHAPES[case]))}",
        "seconds": {
            name: [float(f"{s:.4g}") for s in (t.median_s, t.low_s, t.high_s)] for name, t in timings.items()
        },
        "ratio": {name: round(t.median_s / timings[rival].median_s, 3) for name, t in timings.items()},
    }


class _Loop(nn.Module):
    """A cell called step by step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for step, one in enumerate(x):
            state = self.cell(one, state, step=step)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), state


def _pass(module: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    def call() -> None:
        module(x)[0].backward(gradient)

    return call


def _input_calls(length: int, num: int, channels: int) -> dict[str, Callable[[], object]]:
    """Normalization of products (T, N, C) by the statistics of each step, in two ways."""
    products = torch.randn(length, num, channels, requires_grad=True)
    gradient = torch.randn_like(products)
    steps = StepwiseBatchNorm(channels, length, bias=False)
    at_once = BatchNorm1d(length * channels, affine=False)

    def one_by_one() -> None:
        torch.stack([steps(one, t) for t, one in enumerate(products)]).backward(gradient)

    def together() -> None:
        flat = products.transpose(0, 1).reshape(num, -1)
        y = at_once(flat).view(num, length, channels).transpose(0, 1) * steps.weight
        y.backward(gradient)

    return {"step by step": one_by_one, "one call": together}
