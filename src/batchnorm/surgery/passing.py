"""How a map of every entry by itself gets through the steps of a graph, or why it does not.

There is one rule for each of four kinds of step. What a step does is found out by running it: one
that moves entries is run on their numbers, one that averages on ones.
"""

import inspect
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from batchnorm.layers import Normalization
from batchnorm.surgery.diagonal import Diagonal
from batchnorm.surgery.graph import Trace
from batchnorm.surgery.models import fixed_randomness
from batchnorm.surgery.roles import operands_of, uses_of
from batchnorm.surgery.tracer import IN_PLACE_OPERATORS

_TUPLES = ("split", "chunk", "tensor_split", "unbind", "split_with_sizes", "hsplit", "vsplit", "dsplit")
_MOVING = (
    *("reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis", "swapaxes"),
    *("swapdims", "unsqueeze", "squeeze", "narrow", "select", "flip", "roll", "tile", "repeat_interleave"),
    *("cat", "concat", "concatenate", "stack", "expand", "repeat", "view", "contiguous", "clone", "detach"),
    *("getitem", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
    *("slice", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
)
_KEEPING = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_CASTING = ("to", "float", "double", "half", "bfloat16", "type_as", "type")
_JOINING = ("cat", "concat", "concatenate", "stack")
_MOVING_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)
_KEEPING_MODULES = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_AVERAGING_MODULES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_AVERAGING = {getattr(F, f"{kind}avg_pool{d}d"): d for kind in ("", "adaptive_") for d in (1, 2, 3)}
_MAXING = {getattr(F, f"{kind}max_pool{d}d"): d for kind in ("", "adaptive_") for d in (1, 2, 3)}
_MAX_POOLS = tuple(f"{kind}MaxPool{d}d" for kind in ("", "Adaptive") for d in (1, 2, 3))
_AVERAGE_OPERATORS = {str(f.__name__): d for f, d in _AVERAGING.items()}
_MAX_OPERATORS = {f"{kind}max_pool{d}d": d for kind in ("", "adaptive_") for d in (1, 2, 3)}
_ADDING = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACTING = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_MULTIPLYING = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_DIVIDING = (operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_", "divide")
_NEGATING = (operator.neg, torch.neg, torch.negative, "neg", "negative")

Operands = list[tuple[Node, Diagonal]]


class Refused(Exception):
    """A map cannot get through; the message is a phrase that says why."""


def consumers(value: Node) -> list[Node]:
    """The steps that use what a value contains; of one that cuts it up, the steps that take the pieces."""
    found: list[Node] = []
    for user in uses_of(value):
        found += _pieces(user) or [user]
    return found


def _pieces(node: Node) -> list[Node]:
    if _name(node) in _TUPLES and all(user.target is operator.getitem for user in node.users):
        return list(node.users)
    return []


def sources(node: Node) -> list[Node]:
    """The values that a step takes, in the order of its arguments; one may be there more than once."""
    if node.target is operator.getitem and node.args and isinstance(node.args[0], Node):
        whole = node.args[0]
        if _name(whole) in _TUPLES and "shape" not in whole.meta:
            node = whole
    if _name(node) in _JOINING:
        return operands_of(node)
    given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node) and "shape" in a.meta]
    return given


def before(trace: Trace, node: Node, wanted: Diagonal) -> Operands:
    """The maps of a step's inputs that amount to a map of its output.

    Args:
        trace: With shapes measured.
        node: A step that is neither affine nor a normalization with a map of its own.
        wanted: Of its output.

    Raises:
        Refused: There are none, or none that are known.
    """
    inputs, kind = sources(node), _kind(trace, node)
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
    inputs, kind = sources(node), _kind(trace, node)
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
    pads = "Pad" in type(trace.module(node)).__name__ or _name(node) in ("pad", "constant_pad_nd")
    return ", which pads with a number that the map would change" if pads else ""


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    # An operator's name has that of its overload behind a dot.
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name.split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else name


def _is(node: Node, spellings: tuple[object, ...]) -> bool:
    return node.target in spellings or (
        isinstance(node.target, torch._ops.OpOverload) and _name(node) in spellings
    )


def _kind(trace: Trace, node: Node) -> str:
    """``move``, ``keep``, ``sum``, ``number``, ``average``, ``max`` or ``other``."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return "other"
    if not sources(node) or any("shape" not in value.meta for value in (node, *sources(node))):
        return "other"
    module = trace.module(node)
    if module is not None:
        return _kind_of_module(module, node)
    name = _name(node)
    if node.target in _MAXING or name in _MAX_OPERATORS:
        return "max"
    if node.target in _AVERAGING or name in ("mean", *_AVERAGE_OPERATORS):
        return "average"
    if name.startswith("upsample_") and name not in _MOVING:
        return "average"
    if node.target is F.interpolate:
        return "move" if _argument(node, 3, "mode", "nearest").startswith("nearest") else "average"
    if name == "pad":
        return "move" if _argument(node, 2, "mode", "constant") != "constant" else "other"
    if name in _KEEPING or name in _CASTING:
        return "keep"
    if name in _MOVING:
        return "move"
    if _is(node, _NEGATING):
        return "number"
    if _is(node, (*_ADDING, *_SUBTRACTING, *_MULTIPLYING, *_DIVIDING)) and not node.kwargs:
        given = sources(node)
        if len(given) == 2 and len(node.args) == 2 and _is(node, (*_ADDING, *_SUBTRACTING)):
            return "sum"
        return "number" if len(given) == 1 and len(node.args) == 2 else "other"
    return "other"


def _kind_of_module(module: nn.Module, node: Node) -> str:
    if isinstance(module, _MOVING_MODULES):
        return "move"
    if isinstance(module, _KEEPING_MODULES):
        return "keep"
    if isinstance(module, _AVERAGING_MODULES):
        return "average"
    if isinstance(module, nn.Upsample):
        return "move" if module.mode.startswith("nearest") else "average"
    return "max" if type(module).__name__ in _MAX_POOLS else "other"


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def run(trace: Trace, node: Node, given: Mapping[Node, Tensor]) -> Any:
    """What a step makes of other values than the example's.

    Args:
        trace: With shapes measured.
        node: A step; one that takes a piece of what another cuts up stands for both.
        given: The tensors that it takes.

    Raises:
        Refused: It takes something else that is not known.
    """

    def value_of(argument: Node) -> Any:
        if argument in given:
            return given[argument]
        if "value" in argument.meta:
            return argument.meta["value"]
        if _name(argument) in _TUPLES:
            return run(trace, argument, given)
        raise Refused(f"{trace.describe(node)} depends on {trace.describe(argument)}")

    args, kwargs = map_arg(node.args, value_of), map_arg(node.kwargs, value_of)
    module = trace.module(node)
    with torch.no_grad(), fixed_randomness(trace.root):
        if module is not None:
            return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def magnitude(trace: Trace, node: Node, given: Mapping[Node, Tensor]) -> Tensor:
    """The sum of the absolute values of a step's terms, given those of its inputs."""
    kind = _kind(trace, node)
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
    if _name(node) in _CASTING:
        return
    numbers = torch.arange(1, 1 + torch.Size(value.meta["shape"]).numel(), dtype=torch.float64)
    numbers = numbers.view(value.meta["shape"])
    if not torch.equal(_ran(trace, node, {value: numbers.clone()}), numbers):
        raise Refused(f"{trace.describe(node)} is at work in evaluation too")


def _straight(trace: Trace, node: Node) -> tuple[float, float]:
    """Gain and offset of a step that computes gain · x + offset."""
    if _is(node, _NEGATING):
        return -1.0, 0.0
    value = sources(node)[0]
    first = node.args[0] is value
    other = node.args[1] if first else node.args[0]
    number = other.meta.get("value") if isinstance(other, Node) else other
    if not isinstance(number, int | float) or isinstance(number, bool):
        raise Refused(f"{trace.describe(node)} is arithmetic with something that is no number")
    gain, offset = 1.0, 0.0
    if _is(node, _ADDING):
        offset = float(number)
    elif _is(node, _SUBTRACTING):
        gain, offset = (1.0, -float(number)) if first else (-1.0, float(number))
    elif _is(node, _MULTIPLYING):
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
    if _name(node) == "mean":
        given = _argument(node, 1, "dim", None)
        given = [given] if isinstance(given, int) else given
        if not isinstance(given, list | tuple) or not given or any(isinstance(d, Node) for d in given):
            raise Refused(f"{trace.describe(node)} averages over everything")
        return sorted(d % dims for d in given)
    module = trace.module(node)
    if isinstance(module, nn.Upsample) or _name(node) == "interpolate" or _name(node).startswith("upsample"):
        return list(range(2, dims))
    if module is not None:
        spatial = int(type(module).__name__[-2])
    else:
        by_name = {**_AVERAGE_OPERATORS, **_MAX_OPERATORS}
        spatial = {**_AVERAGING, **_MAXING}.get(node.target) or by_name[_name(node)]
    return list(range(dims - spatial, dims))


def _keeps_dims(node: Node) -> bool:
    return _name(node) != "mean" or bool(_argument(node, 2, "keepdim", False))


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


def residual_of(node: Node) -> Node | None:
    """What a call of a layer of ours adds to what it makes of its input."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")
    return given if isinstance(given, Node) else None


def activates(node: Node, layer: nn.Module) -> bool:
    """Whether a call of a layer ends with a nonlinearity."""
    carried = getattr(layer, "activation", None) if isinstance(layer, Normalization) else None
    return carried not in (None, "identity") or node.kwargs.get("activation") is not None


def overwritten(value: Node) -> Iterator[Node]:
    """The steps that write into a value, or into what may be the same memory."""
    todo, seen = [value], {value}
    while todo:
        for user in todo.pop().users:
            if _writes(user):
                yield user
            module = user.meta["call"].module if user.op == "call_module" else None
            shares = _name(user) in (*_MOVING, *_TUPLES, *_KEEPING, *_CASTING) or isinstance(
                module, (*_MOVING_MODULES, *_KEEPING_MODULES)
            )
            if shares and user not in seen:
                seen.add(user)
                todo.append(user)


def _writes(node: Node) -> bool:
    name = _name(node)
    if node.op == "call_module":
        return bool(getattr(node.meta["call"].module, "inplace", False))
    if name.endswith("_") and not name.endswith("__"):
        return True
    if node.target in _IN_PLACE or "out" in node.kwargs:
        return True
    if node.op != "call_function" or node.kwargs.get("inplace") is True:
        return node.kwargs.get("inplace") is True
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a function without a signature
        return False
    return bound.arguments.get("inplace") is True


_IN_PLACE = (operator.setitem, *(getattr(operator, name) for name in IN_PLACE_OPERATORS))
