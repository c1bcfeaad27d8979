"""A forward rewritten from its graph, in the user's own object and class."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from batchnorm.surgery.graph import Call, Trace
from batchnorm.surgery.places import Place
from batchnorm.surgery.tracer import trace


def relative(path: str, base: str) -> str:
    """``path`` as seen from ``base``, which is one of its prefixes."""
    return path[len(base) + 1 :] if base else path


def graph_for_both_modes(whole: Trace, call: Call, places: Sequence[Place], own: tuple[type, ...]) -> Trace:
    """The forward of one module as a graph that is right in training and in evaluation.

    Modules it calls stay calls, unless a place lies inside one of them.

    Args:
        whole: The trace in which the places were found.
        call: The only call of the module.
        places: All inside the call.
        own: Classes of the user's that are one step.

    Returns:
        A trace of the module alone.

    Raises:
        ValueError: The two modes run different steps; or a module that would have to be
            followed has hooks.
        Untraceable: torch.fx cannot follow the forward.
    """
    opened = {c for place in places for node in _sites(place) for c in _between(node, call)}
    for inner in opened:
        if inner.path in whole.hooks:
            raise ValueError(f"{inner.path} has forward hooks, which a traced forward would skip")
    inline = {relative(inner.path, call.path) for inner in opened}
    training, evaluation = (
        trace(call.module, call.args, call.kwargs, training=mode, prefix=call.path, own=own, inline=inline)[0]
        for mode in (True, False)
    )
    _unite(training, evaluation, call)
    return training


def _sites(place: Place) -> tuple[Node, ...]:
    return (place.producer,) if place.after else place.consumers


def _between(node: Node, outer: Call) -> list[Call]:
    """The calls around a step, without that of a leaf, up to but not including ``outer``."""
    chain = node.meta["call"].chain()
    chain = chain[1:] if node.op == "call_module" else chain
    return chain[: chain.index(outer)]


def _unite(training: Trace, evaluation: Trace, call: Call) -> None:
    """Let the training graph ask for the mode where that is all in which the two graphs differ."""
    graph = training.graph
    pairs = list(zip(graph.nodes, evaluation.graph.nodes, strict=False))
    same: dict[Node, Node] = {}
    differ = len(graph.nodes) != len(evaluation.graph.nodes)
    for ours, theirs in pairs:
        left, spec = tree_flatten((ours.args, dict(ours.kwargs)))
        right, other = tree_flatten((theirs.args, dict(theirs.kwargs)))
        if differ or (ours.op, ours.target, spec) != (theirs.op, theirs.target, other):
            raise ValueError(f"its forward takes other steps in training than in evaluation (at {ours.name})")
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            if a is True and b is False:
                with graph.inserting_before(ours):
                    path = relative(ours.meta["call"].path, call.path)
                    left[i] = graph.create_node("get_attr", f"{path}.training" if path else "training")
            elif isinstance(a, Node):
                differ = same.get(a) is not b
            else:
                differ = type(a) is not type(b) or a != b
            if differ:
                raise ValueError(
                    f"its forward works differently in training and in evaluation (at {ours.name})"
                )
        ours.args, ours.kwargs = tree_unflatten(left, spec)
        if ours.op == "get_attr" and not _same_constant(training, evaluation, str(ours.target)):
            raise ValueError("its forward makes a tensor of its own that differs from run to run")
        same[ours] = theirs


def _same_constant(training: Trace, evaluation: Trace, target: str) -> bool:
    """Whether a tensor that the tracer found is one of the module's, or the same in both traces."""
    if not target.startswith("_tensor_constant"):
        return True
    return torch.equal(getattr(training.root, target), getattr(evaluation.root, target))


def put(piece: Trace, outer: Call, place: Place, name: str) -> None:
    """Call the child ``name`` at a place.

    Args:
        piece: As `graph_for_both_modes` returns it; its graph changes.
        outer: The call that ``piece`` describes.
        place: In the trace of the whole.
        name: Of the normalization among the module's children.
    """
    graph = piece.graph
    twins = {node.meta["key"]: node for node in graph.nodes if "key" in node.meta}
    depth = len(outer.chain()) - 1

    def twin(node: Node) -> Node:
        positions, index = node.meta["key"]
        return twins[positions[: len(positions) - depth], index]

    if place.after:
        producer = twin(place.producer)
        with graph.inserting_after(producer):
            normalized = graph.call_module(name, (producer,))
        producer.replace_all_uses_with(normalized, lambda user: user is not normalized)
        return
    consumers = [twin(node) for node in place.consumers]
    value = _leaves(consumers[0])[_leaves(place.consumers[0]).index(place.producer)]
    with graph.inserting_before(min(consumers, key=list(graph.nodes).index)):
        normalized = graph.call_module(name, (value,))
    for consumer in consumers:
        consumer.replace_input_with(value, normalized)


def _leaves(node: Node) -> list[Any]:
    return tree_flatten((node.args, dict(node.kwargs)))[0]


def install(module: nn.Module, piece: Trace) -> None:
    """Let ``module`` run a graph; its class becomes a subclass of itself, and nothing else changes.

    Parameters, children, hooks, attributes and other methods stay, and so does ``isinstance``.

    Args:
        module: Changed in place.
        piece: Of ``module``; the graph's targets are found in it.
    """
    graph = piece.graph
    graph.lint()
    for node in graph.nodes:
        if node.op == "get_attr" and "." not in node.target and not hasattr(module, node.target):
            # A tensor made by the forward from nothing but numbers, which the tracer has kept.
            module.register_buffer(node.target, getattr(piece.root, node.target), persistent=False)
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)  # the way torch.fx itself turns a graph into a function
    cls = type(module)
    body = {
        "forward": namespace["forward"],
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "forward_source": code.src,
    }
    module.__class__ = type(cls.__name__, (cls,), body)
