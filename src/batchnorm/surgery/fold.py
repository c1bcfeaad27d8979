"""Batch normalization composed into the affine layer before it: Algorithm 2, line 11."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import Joined
from batchnorm.surgery.foldable import pairs_of
from batchnorm.surgery.graph import Trace, Untraceable
from batchnorm.surgery.models import as_args, check_example, check_model, copied
from batchnorm.surgery.outcome import Change, Refusal, SurgeryReport, table
from batchnorm.surgery.pairs import FoldProof, fold_pair, prove_pair
from batchnorm.surgery.proof import allowed, largest_difference, widened
from batchnorm.surgery.tracer import trace

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
}


@dataclass(frozen=True)
class FoldReport(SurgeryReport):
    """What was folded, with the proofs.

    Attributes:
        folds: One for each folded pair.
    """

    folds: tuple[FoldProof, ...] = ()

    def __str__(self) -> str:
        head = ("pair", "in float64", "own dtype", "allowed")
        rows = [
            (f"{p.affine} + {p.norm}", f"{p.exact:.1e}", f"{p.miss:.1e}", f"{p.allowed:.1e}")
            for p in self.folds
        ]
        proofs = table("proved, differences relative to the terms summed", rows, head)
        return "\n".join(part for part in (super().__str__(), proofs) if part)


def fold(model: nn.Module, example: Tensor | tuple[Any, ...]) -> tuple[nn.Module, FoldReport]:
    """Compose each batch normalization with the convolution or linear layer that feeds it.

    One linear map remains for each pair. Folded are ``Conv1d``, ``Conv2d``, ``Conv3d`` and
    ``Linear`` directly followed by one normalization over their output channels, where the trace
    shows that nothing else sees the value between. Weights are computed in float64. Each pair is
    proved by itself on demanding inputs, then the whole model on the example; what misses is
    refused. An ``nn.Identity``, the activation that the layer carried, or the sum with the residual
    that it was given stays in the normalization's place, so the classes and forwards of the model
    are the user's.

    Args:
        model: In evaluation mode; not changed.
        example: An input tensor, or a tuple of positional arguments, on the model's device. The
            proof holds for forwards that take the same Python branches as on this example.

    Returns:
        The new model, and the proof: every fold with its figures and every refusal.

    Raises:
        TypeError: ``model`` or ``example`` has the wrong type.
        ValueError: The model or a normalization in it is in training mode, the model cannot be
            copied, or it fails or is not finite on the example.

    Source: Ioffe & Szegedy (2015), Algorithm 2, line 11.
    """
    check_model(model, "fold")
    args = as_args(example)
    _check_mode(model)
    check_example(model, args)
    norms = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    try:
        traced, inputs = trace(model, args, training=None)
        traced.measure(inputs)
    except Untraceable as why:
        reason = f"the model's forward cannot be traced ({why})"
        return copied(model), FoldReport(refusals=tuple(Refusal(path, reason) for path in norms))

    pairs, refusals = pairs_of(model, traced, norms)
    proofs: dict[tuple[str, str], FoldProof] = {}
    for (affine, norm), shape in pairs.items():
        proof = prove_pair(affine, norm, model.get_submodule(affine), model.get_submodule(norm), shape)
        if isinstance(proof, str):
            refusals.append(Refusal(norm, proof))
        else:
            proofs[affine, norm] = proof
    joined = _joined(traced)
    new, miss = _whole(model, args, proofs, joined, refusals)
    changes = tuple(Change(norm, _change(new.get_submodule(norm), affine)) for affine, norm in proofs)
    order = {path: i for i, path in enumerate(norms)}
    refusals.sort(key=lambda refusal: order.get(refusal.where, -1))
    return new, FoldReport(changes, tuple(refusals), check=miss, folds=tuple(proofs.values()))


def _check_mode(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.training and (module is model or isinstance(module, _BatchNorm)):
            name = f"{path!r} ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
            raise ValueError(
                f"fold needs running statistics in use, but {name} is in training mode: "
                f"call model.eval() first"
            )


def _joined(traced: Trace) -> set[str]:
    """Paths of the modules that are called with more than their input: a residual or an activation."""
    return {
        node.meta["call"].path
        for node in traced.graph.nodes
        if node.op == "call_module" and len(node.args) + len(node.kwargs) > 1
    }


def _apply(model: nn.Module, pairs: Sequence[tuple[str, str]], joined: Collection[str]) -> nn.Module:
    """A copy of the model with the pairs folded."""
    new = copied(model)
    for affine, norm in pairs:
        _replace(new, affine, fold_pair(new.get_submodule(affine), new.get_submodule(norm)))
        layer = new.get_submodule(norm)
        _replace(new, norm, _instead(layer, norm in joined).train(layer.training))
    return new


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    if path:
        setattr(model.get_submodule(parent), name, module)


def _instead(norm: nn.Module, joined: bool) -> nn.Module:
    """What takes the place of a normalization whose linear map is elsewhere."""
    carried = getattr(norm, "activation", None)
    if joined:
        return Joined(carried)
    return nn.Identity() if carried in (None, "identity") else _ACTIVATIONS[carried]()


def _change(left: nn.Module, affine: str) -> str:
    if isinstance(left, Joined):
        return f"folded into {affine}; batchnorm's Joined, for the residual or activation, is in its place"
    return f"folded into {affine}; nn.{type(left).__name__} is in its place"


def _whole(
    model: nn.Module,
    args: Sequence[Any],
    proofs: dict[tuple[str, str], FoldProof],
    joined: Collection[str],
    refusals: list[Refusal],
) -> tuple[nn.Module, float | None]:
    """The folded model and its difference on the example; folds that spoil it are taken out of ``proofs``."""
    if not proofs:
        return copied(model), None
    wide, wide_args = widened(model, args)
    limit = allowed(wide)

    def miss(pairs: Sequence[tuple[str, str]]) -> float:
        return largest_difference(wide, _apply(wide, pairs, joined), wide_args)

    if not miss(list(proofs)) <= limit:
        # Alone each pair was right: the forward must see something the trace does not show.
        for pair in list(proofs):
            alone = miss([pair])
            if not alone <= limit:
                del proofs[pair]
                refusals.append(
                    Refusal(pair[1], f"undone: with it the model's output differs by {alone:.1e}")
                )
        together = miss(list(proofs))
        if not together <= limit:
            reason = f"undone: the folds together make the model's output differ by {together:.1e}"
            refusals += [Refusal(norm, reason) for _, norm in proofs]
            proofs.clear()
    new = _apply(model, list(proofs), joined)
    return new, largest_difference(copied(model), copied(new), args) if proofs else None
