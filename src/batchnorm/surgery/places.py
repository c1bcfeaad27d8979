"""Where normalization belongs: from each nonlinearity back to the affine layers that feed it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from batchnorm.surgery.graph import AFFINE, Trace
from batchnorm.surgery.roles import TRANSPARENT, input_of, operands_of, role_of, uses_of

_NORMALIZED = "already normalized by "
_NOTHING = "no affine layer before it: "


@dataclass(frozen=True, eq=False)
class Place:
    """An edge of the graph that wants a normalization.

    Attributes:
        producer: The value to be normalized.
        consumers: The steps that shall see it normalized; its other users keep it as it is.
        affine: The affine layer's step, whose channels are normalized.
        because: Where the edge is when it is not the nonlinearity's own; empty when it is.
        after: Whether the normalization belongs to the producer's side: all that follows sees it.
    """

    producer: Node
    consumers: tuple[Node, ...]
    affine: Node
    because: str = ""
    after: bool = False


def before(trace: Trace, node: Node, is_nonlinear: Callable[[Node], bool]) -> tuple[list[Place], str]:
    """Places of the normalization directly before a nonlinearity.

    Behind a reshape that is the reshape's input, where channels still are where the affine layer
    put them; behind a sum or a concatenation, each operand that comes from an affine layer.

    Args:
        trace: Holds the nonlinearity.
        node: The nonlinearity's step.
        is_nonlinear: Tells nonlinearities among steps.

    Returns:
        The places, and, when there are none, the reason.
    """
    value = input_of(node)
    if value is None:
        return [], f"{_NOTHING}it takes no tensor"
    places, reasons = _search(trace, node, value, "", is_nonlinear)
    if places:
        return places, ""
    return [], next((r for r in reasons if r.startswith(_NORMALIZED)), reasons[0])


def after(trace: Trace, node: Node, is_nonlinear: Callable[[Node], bool]) -> tuple[list[Place], str]:
    """The place of the normalization directly after a nonlinearity; as `before` otherwise."""
    places, reason = before(trace, node, is_nonlinear)
    if reason:
        return [], reason
    straight = [p for p in places if not any(role_of(trace, c) == "reshape" for c in p.consumers)]
    if not straight:
        return [], "a reshape hides which dimension of its output holds the channels"
    gate = _gate(trace, node, (straight[0].producer,), is_nonlinear)
    result = gate[1] if gate else node
    norm = next((user for user in uses_of(result) if role_of(trace, user) == "norm"), None)
    if norm is not None:
        return [], _NORMALIZED + trace.describe(norm)
    return [Place(result, tuple(result.users), straight[0].affine, after=True)], ""


def _search(
    trace: Trace, consumer: Node, value: Node, because: str, is_nonlinear: Callable[[Node], bool]
) -> tuple[list[Place], list[str]]:
    """Places on the way back from an input of ``consumer``, and the reasons of the ways without."""
    way, node = [value], value
    while role_of(trace, node) in TRANSPARENT:
        previous = input_of(node)
        if previous is None:
            break
        node = previous
        way.append(node)
    role = role_of(trace, node)
    # What a sum adds to is a stream of its own when others use it too: an identity branch.
    if because.endswith("add") and any(len(uses_of(step)) > 1 for step in way):
        return [], [f"{_NOTHING}every operand of the {because.split()[-1]} before it is an identity branch"]
    if role == "affine":
        return [_place(trace, consumer, way, because, is_nonlinear)], []
    if role == "norm":
        return [], [_NORMALIZED + trace.describe(node)]
    if role not in ("sum", "concatenation"):
        return [], [f"{_NOTHING}its input comes from {trace.describe(node)}"]
    places: list[Place] = []
    reasons: list[str] = []
    for operand in operands_of(node):
        joined = "before the " + ("add" if role == "sum" else "cat")
        found, missed = _search(trace, node, operand, joined, is_nonlinear)
        places += found
        reasons += missed
    return places, reasons or [_NOTHING + trace.describe(node)]


def _place(
    trace: Trace, consumer: Node, way: Sequence[Node], because: str, is_nonlinear: Callable[[Node], bool]
) -> Place:
    affine = way[-1]
    # Pooling works on the last dimensions, which is where a Linear has its channels.
    moving = ("reshape", "pool") if spatial_dims(trace, affine) == 0 else ("reshape",)
    start = max((i + 1 for i, step in enumerate(way) if role_of(trace, step) in moving), default=0)
    if start:
        return Place(way[start], (way[start - 1],), affine, f"before {trace.describe(way[start - 1])}")
    gate = None if because else _gate(trace, consumer, way, is_nonlinear)
    if gate is None:
        return Place(way[0], (consumer,), affine, because)
    gated, product = gate
    inner = way[way.index(gated) - 1] if gated is not way[0] else consumer
    return Place(gated, (inner, product), affine, "before the product x·g(x)")


def spatial_dims(trace: Trace, affine: Node) -> int:
    """Dimensions of the locations of an affine step: 1 to 3 for convolutions, 0 for linear maps."""
    module = trace.module(affine)
    if module is None:
        names = [getattr(affine.target, "__name__", "")]
    else:
        names = [cls.__name__ for cls in type(module).__mro__ if cls in AFFINE]
    digit = names[0][-2]
    return int(digit) if digit.isdigit() else 0


def _gate(
    trace: Trace, node: Node, way: Sequence[Node], is_nonlinear: Callable[[Node], bool]
) -> tuple[Node, Node] | None:
    """The value and the product of x·g(x), as a SiLU is written by hand, if ``node`` is its g."""
    result = node
    while True:
        users = uses_of(result)
        if len(users) != 1:
            return None
        user = users[0]
        if role_of(trace, user) == "product":
            other = next((a for a in user.args if isinstance(a, Node) and a is not result), None)
            return (other, user) if other is not None and other in way else None
        if not (is_nonlinear(user) or role_of(trace, user) in ("keep", "arithmetic")):
            return None
        result = user
