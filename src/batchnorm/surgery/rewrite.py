"""A forward rewritten from its graph, in the user's own object and class."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import Node

from batchnorm.surgery.graph import Call, Trace
from batchnorm.surgery.modes import Key, by_key, leaves, pair_up, unite
from batchnorm.surgery.places import Place
from batchnorm.surgery.saving import forget_outputs
from batchnorm.surgery.tracer import trace

Edge = tuple[Node, int]
"""A step and the number of one of its arguments, as `leaves` counts them."""


def relative(path: str, base: str) -> str:
    """``path`` as seen from ``base``, which is one of its prefixes."""
    return path[len(base) + 1 :] if base else path


@dataclass(frozen=True)
class Graphs:
    """The forward of one module: one graph for both modes, or one for training and one for evaluation.

    Attributes:
        call: The only call of the module.
        traces: Of the module alone.
        twins: For each trace, its step for a step of the training graph, by ``node.meta["key"]``.
    """

    call: Call
    traces: tuple[Trace, ...]
    twins: tuple[dict[Key, Node], ...]

    def twin(self, index: int, node: Node) -> Node | None:
        """The step of the graph number ``index`` that is ``node`` in the trace of the whole."""
        return _twin(self.twins[index], self.call, node)


def graphs_of(
    whole: Trace, call: Call, steps: Iterable[Node], edges: Sequence[Edge], own: tuple[type, ...] = ()
) -> Graphs:
    """The forward of one module as graphs that are right in training and in evaluation.

    Modules it calls stay calls, unless a step lies inside one of them.

    Args:
        whole: The trace in which the steps were found.
        call: The only call of the module.
        steps: Those that are going to change, all inside the call.
        edges: The arguments that must be the same value in both modes.
        own: Classes of the user's that are one step.

    Returns:
        The graphs, nothing changed in them yet.

    Raises:
        ValueError: The two modes differ in a way that leaves doubt about where the steps are, or
            a module that would have to be followed has hooks.
        Untraceable: torch.fx cannot follow the forward.
    """
    opened = {inner for node in steps for inner in calls_between(node, call)}
    for inner in opened:
        if inner.path in whole.hooks:
            raise ValueError(f"{inner.path} has hooks, which a traced forward would skip")
    inline = {relative(inner.path, call.path) for inner in opened}

    def in_mode(training: bool) -> Trace:
        return trace(
            call.module, call.args, call.kwargs, training=training, prefix=call.path, own=own, inline=inline
        )[0]

    training = in_mode(True)
    if unite(training, in_mode(False), call.path):
        return Graphs(call, (training,), (by_key(training),))
    if inline:
        raise ValueError("its forward takes other steps in training than in evaluation")
    training, evaluation = in_mode(True), in_mode(False)
    found = [(_twin(by_key(training), call, node), value) for node, value in edges]
    twins = pair_up(training, evaluation, [(step, value) for step, value in found if step is not None])
    return Graphs(call, (training, evaluation), (by_key(training), twins))


def steps_of(place: Place) -> tuple[Node, ...]:
    """The steps beside which a normalization is put."""
    return (place.producer,) if place.after else place.consumers


def edges_of(place: Place) -> list[Edge]:
    """The steps of a place, each with the number of the argument that matters."""
    if place.after:
        return [(place.producer, 0)]
    return [edge(place.producer, node) for node in place.consumers]


def edge(value: Node, user: Node) -> Edge:
    """A step and the number of the argument that is ``value``."""
    return user, leaves(user).index(value)


def caller_of(steps: Sequence[Node]) -> Call:
    """The innermost call whose forward makes all the steps."""
    chains = [_around(node) for node in steps]
    return next(call for call in chains[0] if all(call in chain for chain in chains))


def innermost_single(whole: Trace, steps: Sequence[Node]) -> Call:
    """The innermost call whose forward makes all the steps, of a module that is called once."""
    chain = caller_of(steps).chain()
    return next(call for call in chain if call.parent is None or whole.times(call.path) == 1)


def calls_between(node: Node, outer: Call) -> list[Call]:
    """The calls around a step, without that of a leaf, up to but not including ``outer``."""
    chain = _around(node)
    return chain[: chain.index(outer)]


def _around(node: Node) -> list[Call]:
    chain: list[Call] = node.meta["call"].chain()
    return chain[1:] if node.op == "call_module" else chain


def _twin(twins: Mapping[Key, Node], outer: Call, node: Node) -> Node | None:
    positions, index = node.meta["key"]
    return twins.get((positions[: len(positions) - (len(outer.chain()) - 1)], index))


def put(graphs: Graphs, place: Place, name: str) -> None:
    """Call the child ``name`` at a place, in every graph that gets there.

    Args:
        graphs: Change.
        place: In the trace of the whole.
        name: Of the normalization among the module's children.
    """
    for number, piece in enumerate(graphs.traces):
        graph = piece.graph
        found = [(graphs.twin(number, node), i) for node, i in edges_of(place)]
        steps = [(step, i) for step, i in found if step is not None]
        if not steps:
            continue
        if place.after:
            producer = steps[0][0]
            with graph.inserting_after(producer):
                normalized = graph.call_module(name, (producer,))
            for user in [user for user in producer.users if user is not normalized]:
                user.replace_input_with(producer, normalized)
            continue
        value = leaves(steps[0][0])[steps[0][1]]
        order = list(graph.nodes)
        with graph.inserting_before(min((step for step, _ in steps), key=order.index)):
            normalized = graph.call_module(name, (value,))
        for step, _ in steps:
            step.replace_input_with(value, normalized)


def install(module: nn.Module, graphs: Graphs) -> None:
    """Let ``module`` run graphs; its class becomes a subclass of itself, and nothing else changes.

    Parameters, children, hooks, attributes and other methods stay, and so does ``isinstance``.

    Args:
        module: Changed in place.
        graphs: Of ``module``; their targets are found in it.
    """
    compiled = [_compiled(module, piece) for piece in graphs.traces]
    forwards = [forward for forward, _ in compiled]

    @functools.wraps(forwards[0])
    def by_mode(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forwards[0 if self.training else 1](self, *args, **kwargs)

    cls = type(module)
    body = {
        "forward": by_mode if len(forwards) > 1 else forwards[0],
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward_source": "\n".join(source for _, source in compiled),
    }
    module.__class__ = type(cls.__name__, (cls,), body)
    if getattr(cls, "forgets_outputs", False):
        forget_outputs(module)


def _compiled(module: nn.Module, piece: Trace) -> tuple[Callable[..., Any], str]:
    """The function that a graph stands for, and its source."""
    piece.graph.lint()
    for node in piece.graph.nodes:
        if node.op == "get_attr" and "." not in node.target and not hasattr(module, node.target):
            # A tensor made by the forward from nothing but numbers, which the tracer has kept.
            module.register_buffer(node.target, getattr(piece.root, node.target), persistent=False)
    code = piece.graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)  # the way torch.fx itself turns a graph into a function
    return namespace["forward"], code.src


def remark_on(module: nn.Module, graphs: Graphs) -> str:
    """What to know about a module whose forward is going to be replaced by its graphs.

    Args:
        module: Before `install`.
        graphs: Of the module.
    """
    cls = type(module)
    parts = [f"the forward of {cls.__name__} now runs a traced graph; class, attributes and methods are kept"]
    attributes = {name for piece in graphs.traces for name in piece.attributes}
    if attributes:
        parts.append(f"what it read from {', '.join(sorted(attributes))} is fixed at today's values")
    methods = methods_of(cls)
    if methods:
        parts.append(
            f"methods of its own that do not go through forward run as before ({', '.join(methods)})"
        )
    return "; ".join(parts)


def methods_of(cls: type) -> list[str]:
    """Public methods that the user's classes define beside ``forward``."""
    classes = [c for c in cls.__mro__ if not c.__module__.startswith("torch.") and c is not object]
    names = {name for c in classes for name, value in vars(c).items() if callable(value)}
    return sorted(name for name in names if not name.startswith("_") and name != "forward")
