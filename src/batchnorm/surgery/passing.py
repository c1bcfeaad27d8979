"""How a map of every entry by itself gets through the steps of a graph, or why it does not.

There is one rule for each of six kinds of step. What a step does is found out by running it: one
that moves entries is run on their numbers, one that averages on ones.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from batchnorm.surgery import steps
from batchnorm.surgery.diagonal import Diagonal
from batchnorm.surgery.graph import Trace
from batchnorm.surgery.steps import Refused, argument, is_one_of, kind_of, name_of, run, sources

Operands = list[tuple[Node, Diagonal]]


def before(trace: Trace, node: Node, wanted: Diagonal) -> Operands:
    """The maps of a step's inputs that amount to a map of its output.

    Args:
        trace: With shapes measured.
        node: A step that is neither affine nor a normalization with a map of its own.
        wanted: Of its output.

    Raises:
        Refused: There are none, or none that are known.
    """
    inputs, kind = sources(node), kind_of(trace, node)
    name = trace.describe(node)
    if len(set(inputs)) < len(inputs):
        raise Refused(f"{name} takes the same value twice")
    if kind == "move":
        found = wanted.before(_origin(trace, node), [value.meta["shape"] for value in inputs])
        if found is None:
            raise Refused(f"{name} makes copies that would need different maps")
        return list(zip(inputs, found, strict=True))
    if kind == "keep":
        _check_keeps(trace, node)
        return [(inputs[0], wanted)]
    if kind == "sum":
        if any(value.meta["shape"] != node.meta["shape"] for value in inputs):
            raise Refused(f"{name} joins values of different shapes")
        # The shift goes with the first operand, whose sign is never turned.
        return [(inputs[0], wanted), *((value, wanted.without_shift()) for value in inputs[1:])]
    if kind == "number":
        gain, offset = _straight(trace, node)
        shift = (wanted.scale * offset + wanted.shift - offset) / gain
        return [(inputs[0], Diagonal(wanted.scale, shift, wanted.index))]
    index = wanted.index
    if kind in ("average", "max"):
        over = _pooled(node, trace)
        if not _keeps_dims(node):
            for dim in over:
                index = index.unsqueeze(dim)
        found_index = wanted.like(index)
        _check_pool(trace, node, found_index, over, kind)
        return [(inputs[0], found_index)]
    raise Refused(f"it follows {name}, not a convolution or linear layer{_pads(trace, node)}")


def after(trace: Trace, node: Node, value: Node, given: Diagonal) -> Diagonal:
    """The map of a step's output that amounts to a map of one of its inputs.

    Args:
        trace: With shapes measured.
        node: A step that is neither affine nor a normalization with a map of its own.
        value: The input.
        given: Of the input.

    Raises:
        Refused: There is none, or none that is known.
    """
    inputs, kind = sources(node), kind_of(trace, node)
    if kind == "move":
        numbers = [i for i, other in enumerate(inputs) if other is value]
        return given.after(_origin(trace, node), [other.meta["shape"] for other in inputs], numbers)
    if kind == "keep":
        _check_keeps(trace, node)
        return given
    if kind == "number":
        gain, offset = _straight(trace, node)
        return Diagonal(given.scale, gain * given.shift + offset - given.scale * offset, given.index)
    if kind in ("average", "max"):
        over = _pooled(node, trace)
        _check_pool(trace, node, given, over, kind)
        if _keeps_dims(node):
            return given
        index = given.index
        for dim in sorted(over, reverse=True):
            index = index.squeeze(dim)
        return given.like(index)
    if kind == "sum":
        raise Refused(f"{trace.describe(node)} adds another value, whose share would be scaled")
    raise Refused(f"its output goes to {trace.describe(node)}{_pads(trace, node)}")


def _pads(trace: Trace, node: Node) -> str:
    pads = "Pad" in type(trace.module(node)).__name__ or name_of(node) in ("pad", "constant_pad_nd")
    return ", which pads with a number that the map would change" if pads else ""


def magnitude(trace: Trace, node: Node, given: Mapping[Node, Tensor]) -> Tensor:
    """The sum of the absolute values of a step's terms, given those of its inputs."""
    kind = kind_of(trace, node)
    if kind == "sum":
        return sum(given.values(), start=torch.zeros(()))
    if kind == "number":
        gain, offset = _straight(trace, node)
        return next(iter(given.values())) * abs(gain) + abs(offset)
    made: Tensor = run(trace, node, given)
    return made


def _origin(trace: Trace, node: Node) -> Tensor:
    """For each place of a moving step's output, its place among the entries of the inputs."""
    given, start = {}, 0
    for value in sources(node):
        size = torch.Size(value.meta["shape"]).numel()
        # In floating point, which is what these steps take; whole numbers in it are exact.
        numbers = torch.arange(start, start + size, dtype=torch.float64)
        given[value] = numbers.view(value.meta["shape"])
        start += size
    return _ran(trace, node, given).long()


def _ran(trace: Trace, node: Node, given: Mapping[Node, Tensor]) -> Tensor:
    try:
        made = run(trace, node, given)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{trace.describe(node)} could not be examined: {error}") from error
    if not isinstance(made, Tensor) or tuple(made.shape) != node.meta["shape"]:
        raise Refused(f"{trace.describe(node)} gives another shape when it runs again")
    return made


def _check_keeps(trace: Trace, node: Node) -> None:
    value = sources(node)[0]
    if (value.meta["dtype"], value.meta["device"]) != (node.meta["dtype"], node.meta["device"]):
        raise Refused(f"{trace.describe(node)} changes the type")
    if name_of(node) in steps.CASTING:
        return
    numbers = torch.arange(1, 1 + torch.Size(value.meta["shape"]).numel(), dtype=torch.float64)
    numbers = numbers.view(value.meta["shape"])
    if not torch.equal(_ran(trace, node, {value: numbers.clone()}), numbers):
        raise Refused(f"{trace.describe(node)} is at work in evaluation too")


def _straight(trace: Trace, node: Node) -> tuple[float, float]:
    """Gain and offset of a step that computes gain · x + offset."""
    if is_one_of(node, steps.NEGATING):
        return -1.0, 0.0
    value = sources(node)[0]
    first = node.args[0] is value
    other = node.args[1] if first else node.args[0]
    number = other.meta.get("value") if isinstance(other, Node) else other
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise Refused(f"{trace.describe(node)} is arithmetic with something that is no number")
    gain, offset = 1.0, 0.0
    if is_one_of(node, steps.ADDING):
        offset = float(number)
    elif is_one_of(node, steps.SUBTRACTING):
        gain, offset = (1.0, -float(number)) if first else (-1.0, float(number))
    elif is_one_of(node, steps.MULTIPLYING):
        gain = float(number)
    elif first and number:
        gain = 1 / float(number)
    else:
        gain = 0.0
    if not gain or not all(map(torch.isfinite, map(torch.tensor, (gain, offset)))):
        raise Refused(f"{trace.describe(node)} is not arithmetic that can be undone")
    return gain, offset


def _pooled(node: Node, trace: Trace) -> list[int]:
    """The dimensions along which a step averages or takes the largest."""
    value = sources(node)[0]
    dims = len(value.meta["shape"])
    if name_of(node) == "mean":
        given = argument(node, 1, "dim", None)
        given = [given] if isinstance(given, int) else given
        if not isinstance(given, list | tuple) or not given or any(isinstance(d, Node) for d in given):
            raise Refused(f"{trace.describe(node)} averages over everything")
        return sorted(d % dims for d in given)
    spatial = steps.spatial_dims(trace, node)
    return list(range(dims - spatial, dims))


def _keeps_dims(node: Node) -> bool:
    return name_of(node) != "mean" or bool(argument(node, 2, "keepdim", False))


def _check_pool(trace: Trace, node: Node, given: Diagonal, over: list[int], kind: str) -> None:
    name = trace.describe(node)
    if set(given.varies) & set(over):
        raise Refused(f"it is not the same at all places that {name} puts together")
    if kind == "max":
        used = given.index[given.index >= 0]
        if (given.scale[used] <= 0).any():
            raise Refused(f"{name} would choose other values where the scale is not positive")
        return
    value = sources(node)[0]
    ones = torch.ones(value.meta["shape"], dtype=torch.float64)
    if not torch.allclose(_ran(trace, node, {value: ones}), ones.new_ones(()), rtol=0, atol=1e-12):
        raise Refused(f"{name} counts zeros of its own, or its weights do not sum to one")
