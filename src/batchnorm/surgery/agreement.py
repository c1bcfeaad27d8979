"""How closely two models agree on an example: outputs, gradients and running statistics, in both modes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.layers.variation import Variation
from batchnorm.surgery.models import copied, fixed_randomness
from batchnorm.surgery.proof import allowed, difference, roundoff_of, widened

MODES: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "training": nn.Module.train,
    "evaluation": nn.Module.eval,
}
"""Modes of a model, and what puts it there."""


@dataclass(frozen=True)
class Agreement:
    """Largest differences in one mode, each relative to the largest value of its kind.

    Attributes:
        mode: ``training`` or ``evaluation``.
        outputs: Of everything the model returns.
        input_gradients: Of all floating-point inputs.
        parameter_gradients: Of all parameters.
        statistics: Of the buffers after the forward.
        allowed: What rounding explains.
    """

    mode: str
    outputs: float
    input_gradients: float
    parameter_gradients: float
    statistics: float
    allowed: float

    @property
    def largest(self) -> float:
        """The largest of the four; infinite where one of them is not a number."""
        found = [getattr(self, f.name) for f in fields(self)[1:5]]
        return max(value if value == value else float("inf") for value in found)


def compare(
    before: nn.Module, after: nn.Module, args: Sequence[Any], *, but_not_in: Collection[str] = ()
) -> tuple[list[Agreement], list[str]]:
    """Run both models forward and backward on an example, with the same random loss.

    In float64 where the model runs in it, where rounding cannot hide a mistake.

    Args:
        before: Not changed.
        after: Not changed.
        args: Example.
        but_not_in: Modes in which the two are to compute different things; both are to run.

    Returns:
        An agreement for each mode in which ``before`` runs, and a remark for each that is not compared.

    Raises:
        RuntimeError: ``after`` fails in a mode in which ``before`` runs.
    """
    found: list[Agreement] = []
    remarks: list[str] = []
    for mode, switch in MODES.items():
        tried, wide_args = widened(before, args, switch)
        is_wide = roundoff_of(tried) != roundoff_of(before)
        # Copies of their own: the trial has moved running statistics.
        old, new = (copied(m).double() if is_wide else copied(m) for m in (before, after))
        switch(old), switch(new)
        try:
            expected = _run(old, wide_args)
        except Exception as error:  # the user's forward may raise anything
            remarks.append(
                f"not compared in {mode}, where the model fails on the example: "
                f"{type(error).__name__}: {error}"
            )
            continue
        try:
            got = _run(new, wide_args)
        except ValueError as error:
            raise RuntimeError(f"in {mode} the new model fails where the original runs: {error}") from error
        if mode in but_not_in:
            remarks.append(f"not compared in {mode}, where they differ by intent; both models run")
            continue
        # Buffers that only a rewritten forward has are constants of its graph; and what was a buffer,
        # of a layer that learns nothing, may be a parameter now.
        held = {**dict(new.named_parameters()), **got[3]}
        got[3] = {name: tensor for name, tensor in held.items() if name in expected[3]}
        outputs, inputs, parameters, statistics = map(_gap, expected, got)
        found.append(Agreement(mode, outputs, inputs, parameters, statistics, allowed(old)))
    return found, remarks


_Named = dict[str, Tensor]


def _run(model: nn.Module, args: Sequence[Any]) -> list[_Named]:
    """Outputs, gradients of inputs and parameters, and buffers afterwards."""
    leaves = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.clone() if isinstance(value, Tensor) else value
        leaves.append(value.detach().clone().requires_grad_())
        # A forward may write into its input, which autograd forbids for a leaf.
        return leaves[-1].clone()

    with torch.enable_grad(), fixed_randomness(model):
        given = tree_map(leaf, tuple(args))
        outputs = [t for t in tree_leaves(model(*given)) if isinstance(t, Tensor)]
        backward(outputs)
    return [
        {str(i): t.detach() for i, t in enumerate(outputs)},
        {str(i): t.grad for i, t in enumerate(leaves) if t.grad is not None},
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        _buffers(model),
    ]


def _buffers(model: nn.Module) -> _Named:
    """All but those that only one kind of normalization has."""
    found = dict(model.named_buffers())
    for path, module in model.named_modules():
        for name in module.own_buffers if isinstance(module, Variation) else ():
            found.pop(f"{path}.{name}" if path else name, None)
    return found


def backward(outputs: Sequence[Tensor]) -> None:
    """Gradients of a loss in which every entry of every output has its own random weight.

    The plain sum would prove nothing: that of a batch-normalized tensor has gradient zero.
    """
    ends = [t for t in outputs if t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype) for t in ends
    ]
    if ends:
        torch.autograd.backward(ends, weights)


def _gap(before: _Named, after: _Named) -> float:
    if before.keys() != after.keys():
        return float("inf")
    return difference(list(before.values()), [after[name] for name in before])
