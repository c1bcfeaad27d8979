"""Where each normalization's map can go: back into what feeds it, or forward into what it feeds."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.fx import Node, Proxy
from torch.utils._pytree import tree_leaves

from batchnorm.surgery import absorbing
from batchnorm.surgery.absorbing import Line, Taken, border_obstacle, feature_dims
from batchnorm.surgery.diagonal import Diagonal
from batchnorm.surgery.foldable import affine_obstacle, norm_obstacle, sharing
from batchnorm.surgery.graph import AFFINE, Trace
from batchnorm.surgery.passing import after, before
from batchnorm.surgery.roles import input_of
from batchnorm.surgery.steps import Refused, activates, consumers, residual_of
from batchnorm.surgery.writing import overwritten


@dataclass(frozen=True)
class State:
    """What has become of the layers so far.

    Attributes:
        taken: What each layer has taken up, by path.
        gone: Normalizations that are folded into others.
        alone: Normalizations that are a multiply-add now.
    """

    taken: Mapping[str, Taken] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    alone: frozenset[str] = frozenset()


@dataclass
class Draft:
    """A way to fold one normalization.

    Attributes:
        norm: Path.
        values: Those that will be others than before.
        steps: All that make or take such a value.
        takes: The maps for each layer and side, by the call that takes it.
        through: Names of the steps through which the map is moved.
        forward: Whether any of it goes forward.
    """

    norm: str
    values: set[Node] = field(default_factory=set)
    steps: set[Node] = field(default_factory=set)
    takes: dict[tuple[str, str], dict[Node, Line]] = field(default_factory=dict)
    through: list[str] = field(default_factory=list)
    forward: bool = False

    def copy(self) -> "Draft":
        """A draft that can go another way from here."""
        takes = {key: dict(by_call) for key, by_call in self.takes.items()}
        return Draft(self.norm, set(self.values), set(self.steps), takes, list(self.through), self.forward)

    @property
    def targets(self) -> list[str]:
        """Paths of the layers that take up the map."""
        return list(dict.fromkeys(path for path, _ in self.takes))


@dataclass(frozen=True)
class FoldProof:
    """How closely the steps that a fold touches agree with what they were, on demanding inputs.

    Differences are relative to the sum of the absolute values of the terms that make up an
    output, which is what rounding scales with when they cancel.

    Attributes:
        affine: Paths of the layers that took up the normalization, joined by commas; empty for a
            multiply-add in its place.
        norm: Path of the normalization.
        exact: Largest difference when both are computed in float64.
        miss: Largest difference in the layers' own dtype.
        allowed: What rounding in that dtype explains.
        forward: Whether the layers come after the normalization.
        through: The steps that the map was moved through.
    """

    affine: str
    norm: str
    exact: float
    miss: float
    allowed: float
    forward: bool = False
    through: tuple[str, ...] = ()


Proof = Callable[[Draft, State, State], FoldProof | str]
"""Compares the states before and after a draft; gives a reason (a string) against it, or a proof."""


@dataclass
class Plan:
    """All that is to be done to a model.

    Attributes:
        state: Of its layers, in the end.
        folds: Normalizations that are folded, each with its proof.
        alone: Normalizations that are a multiply-add now, with the proof.
        refusals: Why a normalization is not folded, by path.
    """

    state: State
    folds: dict[str, FoldProof] = field(default_factory=dict)
    alone: dict[str, FoldProof] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)


def make_plan(
    model: nn.Module, trace: Trace, norms: Mapping[str, nn.Module], prove: Proof, left: Collection[str] = ()
) -> Plan:
    """Fold what can be folded, in the order of the forward pass.

    Args:
        model: As it was traced.
        trace: With shapes measured.
        norms: By path.
        prove: Says whether a step towards the new model is right.
        left: Paths of normalizations that stay whatever they are.
    """
    planner = _Planner(model, trace, norms, left)
    plan = Plan(State())
    order = [path for path in planner.calls if path in norms]
    for path in [*order, *(path for path in norms if path not in order)]:
        if path in left:
            continue
        reason = planner.obstacles[path]
        if not reason:
            reason = _fold(planner, plan, path, prove)
        if reason:
            plan.refusals[path] = reason
    return plan


def _fold(planner: "_Planner", plan: Plan, path: str, prove: Proof) -> str:
    """Fold one normalization, or make a multiply-add of it; gives the reason if it is not folded."""
    reasons: dict[str, str] = {}
    for way in ("back", "forward", "mixed") if len(planner.calls[path]) > 1 else ("back", "forward"):
        try:
            draft = planner.draft(path, plan.state, way)
            state = planner.done(draft, plan.state)
        except Refused as why:
            reasons[way] = str(why)
            continue
        proof = prove(draft, plan.state, state)
        if not isinstance(proof, str):
            plan.state, plan.folds[path] = state, proof
            return ""
        reasons[way] = proof
    draft = Draft(path, steps=set(planner.calls[path]))
    state = replace(plan.state, alone=plan.state.alone | {path})
    proof = prove(draft, plan.state, state)
    if not isinstance(proof, str):
        plan.state, plan.alone[path] = state, proof
    users = {user.op for node in planner.calls[path] for user in consumers(node)}
    return reasons["back"] + ("" if users <= {"output"} else f"; forward: {reasons['forward']}")


class _Planner:
    def __init__(
        self, model: nn.Module, trace: Trace, norms: Mapping[str, nn.Module], left: Collection[str]
    ) -> None:
        self.model, self.trace, self.norms = model, trace, norms
        self.calls: dict[str, list[Node]] = {}
        for node in trace.graph.nodes:
            if node.op == "call_module":
                self.calls.setdefault(node.meta["call"].path, []).append(node)
        self.obstacles = {
            path: norm_obstacle(path, norm, self.calls.get(path, []), trace) for path, norm in norms.items()
        }
        self.obstacles.update(dict.fromkeys(left, "it stays"))
        self.shared = sharing(model)

    def line(self, path: str, state: State) -> Line:
        """The map of a normalization, with what it has taken up."""
        taken = state.taken.get(path, Taken())
        line = absorbing.line_of(self.norms[path])
        if taken.ahead is not None:
            line = absorbing.joined(taken.ahead, line)
        return line if taken.behind is None else absorbing.joined(line, taken.behind)

    def draft(self, path: str, state: State, way: str) -> Draft:
        """Every call of a normalization folded ``back``, ``forward``, or ``mixed``: back where it can be."""
        if "parameter" in self.shared.get(path, ""):
            raise Refused(f"{path} {self.shared[path]}")
        norm, line, draft = self.norms[path], self.line(path, state), Draft(path)
        for node in self.calls[path]:
            value = input_of(node)
            dims = len(value.meta["shape"])
            given = Diagonal.along(*line, feature_dims(norm, dims), dims)
            draft.steps.add(node)
            kept = draft.copy()
            try:
                if way == "forward":
                    raise Refused("")
                self._back(draft, state, value, given, node)
            except Refused:
                if way == "back":
                    raise
                draft = kept
                self._forth(draft, state, node, given)
        self._check_hooks(draft)
        return draft

    def done(self, draft: Draft, state: State) -> State:
        """The state with a draft carried out, if all calls of the layers that take something agree."""
        taken = dict(state.taken)
        for (path, side), by_call in draft.takes.items():
            lines = list(by_call.values())
            same = all(torch.equal(a, b) for line in lines for a, b in zip(line, lines[0], strict=True))
            if len(lines) < len(self.calls[path]) or not same:
                raise Refused(f"{path} is called {len(self.calls[path])} times, not always followed by it")
            taken[path] = taken.get(path, Taken()).also(side, lines[0])
        return replace(state, taken=taken, gone=state.gone | {draft.norm})

    # Back.

    def _back(self, draft: Draft, state: State, value: Node, wanted: Diagonal, via: Node) -> None:
        """Let what makes a value make another, of which ``via`` makes what it always made."""
        wanted = wanted.settled(seen=any(user is not via for user in consumers(value)))
        if wanted.is_identity:
            return
        path = value.meta["call"].path if value.op == "call_module" else ""
        module = self.model.get_submodule(path) if value.op == "call_module" else None
        if isinstance(module, AFFINE):
            if reason := affine_obstacle(path, module, self.trace, {}):
                raise Refused(reason)
            self._check_others(draft, value, wanted, via)
            if path in self.shared:
                raise Refused(f"{path} {self.shared[path]}")
            draft.steps.add(value)
            self._take(draft, path, value, "behind", module, wanted)
        elif path in self.norms and value.op == "call_module":
            operands = self._through_norm(draft, state, path, value, wanted)
            self._check_others(draft, value, wanted, via)
            draft.steps.add(value)
            for operand, part in operands:
                self._back(draft, state, operand, part, value)
        else:
            operands = before(self.trace, value, wanted)
            self._check_others(draft, value, wanted, via)
            draft.steps.add(value)
            draft.through.append(self.trace.describe(value))
            for operand, part in operands:
                self._back(draft, state, operand, part, value)
        draft.values.add(value)

    def _through_norm(
        self, draft: Draft, state: State, path: str, node: Node, wanted: Diagonal
    ) -> list[tuple[Node, Diagonal]]:
        norm = self.norms[path]
        if path not in state.gone | state.alone or activates(node, norm):
            carried = " and its activation" if path in state.gone | state.alone else ""
            raise Refused(f"it follows {path}{carried}, not a convolution or linear layer")
        residual = residual_of(node)
        operands = [] if residual is None else [(residual, wanted.without_shift())]
        if residual is not None and residual.meta["shape"] != node.meta["shape"]:
            raise Refused(f"the residual of {path} has another shape")
        if path in state.alone:
            self._take(draft, path, node, "behind", norm, wanted)
            return operands
        value = input_of(node)
        assert value is not None
        return [(value, wanted), *operands]

    def _check_others(self, draft: Draft, value: Node, wanted: Diagonal, via: Node) -> None:
        """Whether all other uses of a value see what they always saw."""
        for user in consumers(value):
            if user is via:
                continue
            try:
                untouched = after(self.trace, user, value, wanted).is_identity
            except Refused:
                untouched = False
            if not untouched:
                name, other = self.trace.describe(value), self.trace.describe(user)
                raise Refused(f"the output of {name} is also used by {other}")
            draft.steps.add(user)

    # Forward.

    def _forth(self, draft: Draft, state: State, value: Node, given: Diagonal) -> None:
        """Let all that takes a normalization's output take its input and make what it always made."""
        node = value
        if node in self.calls[draft.norm]:
            norm = self.norms[draft.norm]
            if activates(node, norm) or residual_of(node) is not None:
                raise Refused("its output is added to or activated")
            for alias in (input_of(node), node):
                writer = next(iter(overwritten(alias)), None)
                if writer is not None:
                    raise Refused(f"{self.trace.describe(writer)} writes into its input or output")
        if given.is_identity:
            return
        if not consumers(value):
            raise Refused("nothing uses its output")
        draft.forward = True
        draft.values.add(value)
        for user in consumers(value):
            draft.steps.add(user)
            self._forth_into(draft, state, user, value, given)

    def _forth_into(self, draft: Draft, state: State, user: Node, value: Node, given: Diagonal) -> None:
        path = user.meta["call"].path if user.op == "call_module" else ""
        module = self.model.get_submodule(path) if user.op == "call_module" else None
        if isinstance(module, AFFINE):
            reason = affine_obstacle(path, module, self.trace, self.shared) or border_obstacle(module, path)
            if reason:
                raise Refused(reason)
            self._take(draft, path, user, "ahead", module, given)
        elif path in self.norms and user.op == "call_module":
            if self.obstacles[path] or path in state.gone or residual_of(user) is value:
                raise Refused(f"its output goes to {path}, which cannot take it up")
            self._take(draft, path, user, "ahead", self.norms[path], given)
        else:
            moved = after(self.trace, user, value, given)
            draft.through.append(self.trace.describe(user))
            self._forth(draft, state, user, moved)

    # What layers take up.

    def _take(
        self, draft: Draft, path: str, node: Node, side: str, layer: nn.Module, wanted: Diagonal
    ) -> None:
        value = node if side == "behind" else input_of(node)
        shape = value.meta["shape"]
        dims = feature_dims(layer, len(shape))
        if not set(wanted.varies) <= set(dims):
            raise Refused(_misplaced(layer, path, shape, dims, wanted.varies))
        line = wanted.at(shape, dims)
        by_call = draft.takes.setdefault((path, side), {})
        if node in by_call:
            # Two parts of one map, as of the halves of a value that was cut in two.
            line = absorbing.joined(by_call[node], line)
        by_call[node] = line

    def _check_hooks(self, draft: Draft) -> None:
        for call in self.trace.calls:
            if call.path not in self.trace.hooks:
                continue
            seen = tree_leaves((call.args, call.kwargs, call.result))
            if any(isinstance(s, Proxy) and s.node in draft.values for s in seen):
                raise Refused(f"{call.path or 'the model'} has hooks, which would see other values")


def _misplaced(
    layer: nn.Module, path: str, shape: tuple[int, ...], dims: list[int], varies: list[int]
) -> str:
    """Why a map is over other dimensions than a layer's channels."""
    if len(varies) > 1 or varies == [0]:
        return f"it has another scale at every location of the values of {path}"
    if isinstance(layer, AFFINE) and not isinstance(layer, nn.Linear) and len(shape) != layer.weight.dim():
        return f"{path} runs without a batch dimension, so that it normalizes a location"
    if isinstance(layer, nn.Linear):
        return (
            f"it normalizes dimension {varies[0]} of the output {shape} of {path}, "
            f"whose features are in the last"
        )
    place = "the last dimension" if varies[0] == len(shape) - 1 else f"dimension {varies[0]}"
    return f"it normalizes {place}, but {path} has its channels in dimension {dims[0]}"
