"""Which normalizations can take up the activation behind them, and the sum between, as traces prove it."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Node

from batchnorm.functional import ACTIVATIONS
from batchnorm.kernels.activations import ELU_ALPHA, LEAKY_SLOPE
from batchnorm.surgery import nonlinearities
from batchnorm.surgery.graph import Trace
from batchnorm.surgery.rewrite import caller_of
from batchnorm.surgery.roles import role_of
from batchnorm.surgery.tracer import IN_PLACE_OPERATORS

_CONSTANTS = {
    "leaky_relu": ("negative_slope", LEAKY_SLOPE),
    "elu": ("alpha", ELU_ALPHA),
    "gelu": ("approximate", "none"),
}
"""The one setting of an activation that must be torch's default."""


@dataclass(frozen=True, eq=False)
class Fusion:
    """A normalization's call and the steps it can take up.

    Attributes:
        trace: In which they were found.
        norm: The call.
        add: The sum of its output and a residual, if there is one.
        act: The activation.
        activation: Its name.
    """

    trace: Trace
    norm: Node
    add: Node | None
    act: Node
    activation: str

    @property
    def steps(self) -> tuple[Node, ...]:
        """The normalization, the sum and the activation."""
        return tuple(step for step in (self.norm, self.add, self.act) if step is not None)

    def __str__(self) -> str:
        joined = f"{self.trace.describe(self.add)} and " if self.add else ""
        return f"fused with {joined}{self.trace.describe(self.act)} ({self.activation})"


@dataclass(frozen=True)
class Evaluation:
    """What happens in evaluation mode.

    Attributes:
        traces: All there are.
        called: Paths of all modules that are called, also where no trace shows it.
    """

    traces: Sequence[Trace]
    called: Collection[str]


Finding = Fusion | str
"""What can be done with a call, or why nothing can; an empty reason where no activation follows."""


def fusions_of(
    model: nn.Module, training: Sequence[Trace], evaluation: Evaluation, norms: Sequence[str]
) -> dict[str, list[Finding]]:
    """Look at every call of every normalization.

    Args:
        model: As it was traced.
        training: All traces in training mode.
        evaluation: What happens in evaluation mode.
        norms: Paths of the normalizations in question.

    Returns:
        By path, a finding for each call in training; in the order of the forward pass.
    """
    in_training = _survey(model, training, norms)
    in_evaluation = _survey(model, evaluation.traces, norms)
    for path, findings in in_training.items():
        # A layer that evaluation never calls, as in an auxiliary head, has nothing to disagree with.
        if path not in evaluation.called:
            continue
        if Counter(map(str, findings)) == Counter(map(str, in_evaluation.get(path, []))):
            continue
        reason = "in evaluation other steps follow it than in training, or none that can be traced"
        in_training[path] = [reason if isinstance(finding, Fusion) else finding for finding in findings]
    return in_training


def _survey(model: nn.Module, found: Sequence[Trace], norms: Sequence[str]) -> dict[str, list[Finding]]:
    findings: dict[str, list[Finding]] = {}
    for trace in found:
        order = {node: i for i, node in enumerate(trace.graph.nodes)}
        taken: set[Node] = set()
        for node in trace.graph.nodes:
            path = node.meta["call"].path if node.op == "call_module" else None
            if path in norms:
                finding = _look(model, trace, node, order, taken)
                findings.setdefault(path, []).append(finding)
                if isinstance(finding, Fusion):
                    taken.add(finding.act)
    return findings


def _look(model: nn.Module, trace: Trace, norm: Node, order: dict[Node, int], taken: set[Node]) -> Finding:
    users = list(norm.users)
    joins = [user for user in users if role_of(trace, user) == "sum"]
    if not any(_kind(trace, after) for step in (norm, *joins) for after in step.users):
        return ""
    if len(users) > 1:
        return f"its output is also used by {', '.join(trace.describe(user) for user in users[1:])}"
    if len(norm.args) != 1 or norm.kwargs:
        return "it is called with more than its input already (a residual, a mask or an activation)"
    add = joins[0] if joins else None
    act = users[0] if add is None else next(user for user in add.users if _kind(trace, user))
    if add is not None and act in taken:
        return f"{trace.describe(add)} is taken up by the other operand's normalization"
    reason = (
        _activation_reason(model, trace, act)
        or (_join_reason(trace, norm, add, order) if add is not None else "")
        or _hooks_reason(trace, [norm, add, act] if add is not None else [norm, act])
    )
    kind = _kind(trace, act)
    return reason or Fusion(trace, norm, add, act, str(kind))


def _kind(trace: Trace, node: Node) -> str | None:
    return nonlinearities.kind_of(node, trace.module(node))


def _activation_reason(model: nn.Module, trace: Trace, act: Node) -> str:
    """Why an activation cannot be part of a normalization."""
    name, kind = trace.describe(act), str(_kind(trace, act))
    if kind not in ACTIVATIONS:
        return f"{name} is a {kind}, which the layers do not carry ({', '.join(ACTIVATIONS)})"
    setting, default = _CONSTANTS.get(kind, ("", None))
    if act.op == "call_module":
        module = model.get_submodule(act.meta["call"].path)
        if not type(module).__module__.startswith("torch.nn."):
            return f"{name} is a {type(module).__name__}, a class of its own"
        given = [getattr(module, setting)] if setting else []
    else:
        # What is not a flag (such as inplace) is the setting, by position or by name.
        given = [a for a in (*act.args[1:], *act.kwargs.values()) if not isinstance(a, bool | Node)]
        if len(act.all_input_nodes) != 1:
            return f"{name} is called with more than one tensor"
    if any(value != default for value in given):
        return f"{name} has {setting or 'an argument'} {given[0]!r}, where the layers have {default!r}"
    return ""


def _join_reason(trace: Trace, norm: Node, add: Node, order: dict[Node, int]) -> str:
    """Why a sum cannot be part of a normalization."""
    name = trace.describe(add)
    operands = add.all_input_nodes
    if len(operands) != 2 or len(add.args) + len(add.kwargs) != 2:
        return f"{name} is not a plain sum of two tensors"
    if len(add.users) != 1:
        return f"{name} has other users than the activation"
    other = operands[0] if operands[1] is norm else operands[1]
    for key in ("shape", "dtype", "device"):
        ours, theirs = norm.meta.get(key), other.meta.get(key)
        if ours is None or ours != theirs:
            return f"{name} joins tensors of different {key} ({ours} and {theirs})"
    if overwrites(trace, add) and add.args[0] is other:
        fresh = other.op == "call_module" and role_of(trace, other) in ("norm", "affine")
        if not fresh or len(other.users) > 1:
            return f"{name} overwrites {trace.describe(other)}, which may be used elsewhere"
    # The fused layer runs where the sum was: what lies between must not notice.
    for node, position in order.items():
        if order[norm] < position < order[add]:
            if overwrites(trace, node):
                return f"{trace.describe(node)} overwrites a tensor between it and {name}"
            if node.op == "call_module" and node.meta["call"].path == norm.meta["call"].path:
                return f"it is called again before {name}"
    return ""


def overwrites(trace: Trace, node: Node) -> bool:
    """Whether a step writes into one of its arguments, as far as its name and settings tell."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return False
    if node.op == "call_function" and getattr(node.target, "__name__", "") in (
        *IN_PLACE_OPERATORS,
        "setitem",
    ):
        return True
    return "out" in node.kwargs or nonlinearities.works_in_place(node, trace.module(node))


def _hooks_reason(trace: Trace, steps: list[Node]) -> str:
    """Which module with hooks, that would see other values, is a step or ends or begins between them."""
    outer = caller_of(steps).chain()
    for node in steps:
        for call in node.meta["call"].chain():
            if call not in outer and call.path in trace.hooks:
                return f"{call.path} has hooks, which would see other values"
    return ""
