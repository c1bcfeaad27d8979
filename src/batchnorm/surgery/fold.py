"""Batch normalization composed into the affine layers beside it: Algorithm 2, line 11."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import Joined, Normalization
from batchnorm.surgery.examples import other_sizes, two_of
from batchnorm.surgery.graph import Trace, Untraceable
from batchnorm.surgery.kind import is_normalization
from batchnorm.surgery.lift import is_exported, lifted
from batchnorm.surgery.models import as_args, check_example, check_model, copied
from batchnorm.surgery.outcome import Change, Note, Refusal, SurgeryReport, table
from batchnorm.surgery.plan import Draft, FoldProof, Plan, State, make_plan
from batchnorm.surgery.proof import allowed, largest_difference, widened
from batchnorm.surgery.region import built, prove
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
_LIFTED = "the exported program's layers are modules again, and its checks of the inputs are left out"


@dataclass(frozen=True)
class FoldReport(SurgeryReport):
    """What was folded, with the proofs.

    Attributes:
        folds: One for each normalization that is folded into other layers.
        alone: One for each that is a multiply-add in its own place.
    """

    folds: tuple[FoldProof, ...] = ()
    alone: tuple[FoldProof, ...] = ()

    def __str__(self) -> str:
        head = ("fold", "in float64", "own dtype", "allowed")
        rows = [
            (_pair(p), f"{p.exact:.1e}", f"{p.miss:.1e}", f"{p.allowed:.1e}")
            for p in (*self.folds, *self.alone)
        ]
        proofs = table("proved, differences relative to the terms summed", rows, head)
        return "\n".join(part for part in (super().__str__(), proofs) if part)


def _pair(proof: FoldProof) -> str:
    if not proof.affine:
        return f"{proof.norm} alone"
    sides = (proof.norm, proof.affine) if proof.forward else (proof.affine, proof.norm)
    return " + ".join(sides)


def fold(model: nn.Module, example: Tensor | tuple[Any, ...]) -> tuple[nn.Module, FoldReport]:
    """Compose each batch normalization with the convolutions and linear layers beside it.

    In evaluation a normalization is a map of every channel by itself. It is moved back to the layers
    that feed it, or else forward to those that it feeds: convolutions, transposed convolutions and
    linear layers, and other normalizations. It moves through whatever moves entries about (reshape,
    permute, concatenation, slices), averages them, or adds them up, where the trace shows that nothing
    else sees the values between, and where it is exact: never across a nonlinearity, nor zeros that a
    convolution pads with. What cannot be moved becomes one multiply-add.

    Weights are computed in float64 and rounded once. Each fold is proved by itself on demanding inputs,
    then the whole model on the example, and on others of its size where it runs on them; what misses is
    refused. An ``nn.Identity``, the activation that the layer carried, or the sum with the residual that
    it was given stays in the normalization's place, so the classes and forwards of the model are the
    user's.

    Args:
        model: In evaluation mode; not changed. Of an exported program its ``module()``: in the new model
            its layers are modules again.
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
    if isinstance(model, torch.export.ExportedProgram):
        raise TypeError("fold needs a torch.nn.Module: give program.module(), and export the result again")
    notes: tuple[Note, ...] = ()
    if is_exported(model):
        model, notes = lifted(model), (Note("", _LIFTED),)
    check_model(model, "fold")
    args = as_args(example)
    _check_mode(model)
    check_example(model, args)
    norms = {path: m for path, m in model.named_modules() if is_normalization(m)}
    try:
        traced = _traced(model, args)
    except Untraceable as why:
        reason = f"the model's forward cannot be traced ({why})"
        return copied(model), FoldReport(refusals=tuple(Refusal(path, reason) for path in norms), notes=notes)

    undone: dict[str, str] = {}

    def planned(left: Collection[str]) -> Plan:
        def proved(draft: Draft, before: State, after: State) -> FoldProof | str:
            return prove(model, traced, norms, draft, before, after)

        return make_plan(model, traced, norms, proved, left)

    plan = planned(())
    joined = _joined(traced)
    new, miss, plan = _whole(model, args, norms, joined, plan, planned, undone)
    proofs = plan.folds
    changes = [Change(path, _change(new.get_submodule(path), p)) for path, p in proofs.items()]
    changes += [
        Change(path, "one multiply-add, batchnorm's ScaleShift, is in its place") for path in plan.alone
    ]
    order = {path: i for i, path in enumerate(norms)}
    refusals = [Refusal(path, reason) for path, reason in {**plan.refusals, **undone}.items()]
    refusals.sort(key=lambda refusal: order.get(refusal.where, -1))
    changes.sort(key=lambda change: order[change.where])
    refusals += _functions(traced)
    alone = tuple(plan.alone.values())
    return new, FoldReport(
        tuple(changes), tuple(refusals), notes, check=miss, folds=tuple(proofs.values()), alone=alone
    )


def _traced(model: nn.Module, args: tuple[Any, ...]) -> Trace:
    """The trace, with the shapes of a batch of two where the model takes one: a batch of one hides much."""
    pair = two_of(args)
    if pair is not None:
        try:
            traced, inputs = trace(model, pair, training=None)
            traced.measure(inputs)
            return traced
        except Exception:  # the user's forward may raise anything on another batch
            pass
    traced, inputs = trace(model, args, training=None)
    traced.measure(inputs)
    return traced


def _functions(traced: Trace) -> list[Refusal]:
    """Normalizations that are no layers."""
    reason = "it is a function here, not a layer that could be replaced"
    return [
        Refusal(traced.describe(node), reason)
        for node in traced.graph.nodes
        if node.op == "call_function" and "batch_norm" in str(getattr(node.target, "__name__", ""))
    ]


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


def _apply(
    model: nn.Module, norms: Mapping[str, nn.Module], plan: Plan, joined: Collection[str]
) -> nn.Module:
    """A copy of the model as a plan has it."""
    new = copied(model)
    there = {path: new.get_submodule(path) for path in norms}
    state = plan.state
    made = {
        path: built(new, path, there, state, bare=False)
        for path in dict.fromkeys((*state.taken, *state.gone, *state.alone))
    }
    for path in state.gone:
        layer = there[path]
        made[path] = _instead(layer, path in joined).train(layer.training)
    for path, module in made.items():
        _replace(new, path, module)
    return new


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another, under all its names."""
    old = model.get_submodule(path)
    for name, there in list(model.named_modules(remove_duplicate=False)):
        if there is old and name:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)


def _instead(norm: nn.Module, joined: bool) -> nn.Module:
    """What takes the place of a normalization whose linear map is elsewhere."""
    carried = norm.activation if isinstance(norm, Normalization) else None
    if joined:
        return Joined(carried)
    return nn.Identity() if carried in (None, "identity") else _ACTIVATIONS[carried]()


def _change(left: nn.Module, proof: FoldProof) -> str:
    through = f" through {', '.join(proof.through)}" if proof.through else ""
    forward = "forward " if proof.forward else ""
    what = f"folded {forward}into {proof.affine}{through}"
    if isinstance(left, Joined):
        return f"{what}; batchnorm's Joined, for the residual or activation, is in its place"
    return f"{what}; nn.{type(left).__name__} is in its place"


def _whole(
    model: nn.Module,
    args: Sequence[Any],
    norms: Mapping[str, nn.Module],
    joined: Collection[str],
    plan: Plan,
    planned: Callable[[Collection[str]], Plan],
    undone: dict[str, str],
) -> tuple[nn.Module, float | None, Plan]:
    """The new model, its difference on the example, and the plan without what spoils the model.

    Reasons for what was taken out are added to ``undone``.
    """
    touched = [path for path in norms if path in plan.folds or path in plan.alone]
    if not touched:
        return copied(model), None, plan
    wide, wide_args = widened(model, args)
    limit = allowed(wide)
    sizes = [wide_args, *other_sizes(wide, wide_args)]

    def miss(plan: Plan) -> float:
        new = _apply(wide, {path: wide.get_submodule(path) for path in norms}, plan, joined)
        return max(largest_difference(wide, new, given) for given in sizes)

    if not miss(plan) <= limit:
        # By itself each fold was right: the forward must see something the trace does not show.
        for path in touched:
            alone = miss(planned([other for other in norms if other != path]))
            if not alone <= limit:
                undone[path] = f"undone: with it the model's output differs by {alone:.1e}"
        plan = planned(list(undone))
        together = miss(plan)
        if not together <= limit:
            reason = f"undone: the folds together make the model's output differ by {together:.1e}"
            undone.update({path: reason for path in touched if path not in undone})
            plan = planned(list(norms))
    if not plan.folds and not plan.alone:
        return copied(model), None, plan
    new = _apply(model, norms, plan, joined)
    return new, largest_difference(copied(model), copied(new), args), plan
