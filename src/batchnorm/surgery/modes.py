"""Two graphs of one forward, in training and in evaluation: where they are the same."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_flatten, tree_unflatten

from batchnorm.surgery.graph import Trace

Key = tuple[tuple[int, ...], int]
_CONSTANT = "_tensor_constant"


def by_key(trace: Trace) -> dict[Key, Node]:
    """The steps of a trace by their place among those of their calls."""
    return {node.meta["key"]: node for node in trace.graph.nodes if "key" in node.meta}


def leaves(node: Node) -> list[Any]:
    """All arguments of a step, out of their containers."""
    return tree_flatten((node.args, dict(node.kwargs)))[0]


def unite(training: Trace, evaluation: Trace, path: str) -> bool:
    """Let the training graph ask for the mode, if that is all in which the two graphs differ.

    Args:
        training: Its graph may change, also when the answer is no.
        evaluation: Of the same module.
        path: Of the module.

    Returns:
        Whether the training graph now serves both modes.

    Raises:
        ValueError: The forward makes a random tensor, which a graph would make a constant.
    """
    graph = training.graph
    if len(graph.nodes) != len(evaluation.graph.nodes):
        return False
    same: dict[Node, Node] = {}
    for ours, theirs in list(zip(graph.nodes, evaluation.graph.nodes, strict=True)):
        left, spec = tree_flatten((ours.args, dict(ours.kwargs)))
        right, other = tree_flatten((theirs.args, dict(theirs.kwargs)))
        if (ours.op, ours.target, spec) != (theirs.op, theirs.target, other):
            return False
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            if a is True and b is False:
                inner = ours.meta["call"].path[len(path) + 1 if path else 0 :]
                with graph.inserting_before(ours):
                    left[i] = graph.create_node("get_attr", f"{inner}.training" if inner else "training")
            elif (same.get(a) is not b) if isinstance(a, Node) else (type(a) is not type(b) or a != b):
                return False
        ours.args, ours.kwargs = tree_unflatten(left, spec)
        if ours.op == "get_attr" and str(ours.target).startswith(_CONSTANT):
            made = [getattr(trace.root, str(ours.target)) for trace in (training, evaluation)]
            if not torch.equal(*made):
                raise ValueError("its forward makes a tensor of its own that differs from run to run")
        same[ours] = theirs
    return True


def pair_up(training: Trace, evaluation: Trace, steps: Sequence[tuple[Node, int]]) -> dict[Key, Node]:
    """The steps of the evaluation graph that are steps of the training graph too.

    Args:
        training: Of a module that takes other steps in training than in evaluation.
        evaluation: Of the same module.
        steps: Those of the training graph that matter, each with the number of the argument that
            must be the same value in both.

    Returns:
        Steps of the evaluation graph, by their twins' keys. A step that matters and is missing
        belongs to training alone.

    Raises:
        ValueError: It is in doubt whether a step that matters has a twin.
    """
    sides = [[n for n in t.graph.nodes if n.op not in ("get_attr", "output")] for t in (training, evaluation)]
    marks = [[(n.op, str(n.target), n.meta["call"].path) for n in side] for side in sides]
    twins: dict[Node, Node] = {}
    for start, other, size in SequenceMatcher(a=marks[0], b=marks[1], autojunk=False).get_matching_blocks():
        twins.update(zip(sides[0][start : start + size], sides[1][other : other + size], strict=True))
    alone = [mark for n, mark in zip(sides[1], marks[1], strict=True) if n not in set(twins.values())]
    for trace in (training, evaluation):
        if any(n.op == "get_attr" and str(n.target).startswith(_CONSTANT) for n in trace.graph.nodes):
            raise ValueError("its forward makes tensors of its own, and takes other steps in training")
    for step, argument in steps:
        twin = twins.get(step)
        if twin is None:
            certain = (step.op, str(step.target), step.meta["call"].path) not in alone
        else:
            value = leaves(step)[argument]
            certain = twins.get(value) is leaves(twin)[argument]
        if not certain:
            raise ValueError(
                f"it is in doubt which of its steps in evaluation is that in training (at {step.name})"
            )
    return {ours.meta["key"]: theirs for ours, theirs in twins.items() if "key" in ours.meta}
