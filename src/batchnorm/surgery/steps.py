"""What the steps of a graph do to the entries of a value, and what they make of other values."""

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from batchnorm.layers import Normalization
from batchnorm.surgery.graph import Trace
from batchnorm.surgery.models import fixed_randomness
from batchnorm.surgery.roles import operands_of, uses_of

_TUPLES = ("split", "chunk", "tensor_split", "unbind", "split_with_sizes", "hsplit", "vsplit", "dsplit")
_MOVING = (
    *("reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis", "swapaxes"),
    *("swapdims", "unsqueeze", "squeeze", "narrow", "select", "flip", "roll", "tile", "repeat_interleave"),
    *("cat", "concat", "concatenate", "stack", "expand", "repeat", "view", "contiguous", "clone", "detach"),
    *("getitem", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
    *("slice", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
)
_KEEPING = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
CASTING = ("to", "float", "double", "half", "bfloat16", "type_as", "type")
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
ADDING = (operator.add, operator.iadd, torch.add, "add", "add_")
SUBTRACTING = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
MULTIPLYING = (operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply")
_DIVIDING = (operator.truediv, operator.itruediv, torch.div, torch.divide, "div", "div_", "divide")
NEGATING = (operator.neg, torch.neg, torch.negative, "neg", "negative")


class Refused(Exception):
    """A map cannot get through; the message is a phrase that says why."""


def consumers(value: Node) -> list[Node]:
    """The steps that use what a value contains; of one that cuts it up, the steps that take the pieces."""
    found: list[Node] = []
    for user in uses_of(value):
        found += _pieces(user) or [user]
    return found


def _pieces(node: Node) -> list[Node]:
    if name_of(node) in _TUPLES and all(user.target is operator.getitem for user in node.users):
        return list(node.users)
    return []


def sources(node: Node) -> list[Node]:
    """The values that a step takes, in the order of its arguments; one may be there more than once."""
    if node.target is operator.getitem and node.args and isinstance(node.args[0], Node):
        whole = node.args[0]
        if name_of(whole) in _TUPLES and "shape" not in whole.meta:
            node = whole
    if name_of(node) in _JOINING:
        return operands_of(node)
    given = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node) and "shape" in a.meta]
    return given


def name_of(node: Node) -> str:
    """The name of the function or method of a step; empty for that of a module."""
    if node.op == "call_method":
        return str(node.target)
    # An operator's name has that of its overload behind a dot.
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return name.split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else name


def is_one_of(node: Node, spellings: tuple[object, ...]) -> bool:
    """Whether a step is one of several functions, or a method or an operator with such a name."""
    return node.target in spellings or (
        isinstance(node.target, torch._ops.OpOverload) and name_of(node) in spellings
    )


def kind_of(trace: Trace, node: Node) -> str:
    """``move``, ``keep``, ``sum``, ``number``, ``average``, ``max`` or ``other``."""
    if node.op not in ("call_module", "call_function", "call_method"):
        return "other"
    if not sources(node) or any("shape" not in value.meta for value in (node, *sources(node))):
        return "other"
    module = trace.module(node)
    if module is not None:
        return _kind_of_module(module, node)
    name = name_of(node)
    if node.target in _MAXING or name in _MAX_OPERATORS:
        return "max"
    if node.target in _AVERAGING or name in ("mean", *_AVERAGE_OPERATORS):
        return "average"
    if name.startswith("upsample_") and name not in _MOVING:
        return "average"
    if node.target is F.interpolate:
        return "move" if argument(node, 3, "mode", "nearest").startswith("nearest") else "average"
    if name == "pad":
        return "move" if argument(node, 2, "mode", "constant") != "constant" else "other"
    if name in _KEEPING or name in CASTING:
        return "keep"
    if name in _MOVING:
        return "move"
    if is_one_of(node, NEGATING):
        return "number"
    if is_one_of(node, (*ADDING, *SUBTRACTING, *MULTIPLYING, *_DIVIDING)) and not node.kwargs:
        given = sources(node)
        if len(given) == 2 and len(node.args) == 2 and is_one_of(node, (*ADDING, *SUBTRACTING)):
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


def spatial_dims(trace: Trace, node: Node) -> int:
    """How many of the last dimensions a pool or a change of size puts together."""
    module = trace.module(node)
    name = name_of(node)
    if isinstance(module, nn.Upsample) or name == "interpolate" or name.startswith("upsample"):
        return len(node.meta["shape"]) - 2
    if module is not None:
        return int(type(module).__name__[-2])
    by_function: dict[Any, int] = {**_AVERAGING, **_MAXING}
    return by_function.get(node.target) or {**_AVERAGE_OPERATORS, **_MAX_OPERATORS}[name]


def argument(node: Node, place: int, name: str, default: Any) -> Any:
    """An argument of a function's step, given by place or by name."""
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
        if name_of(argument) in _TUPLES:
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


def residual_of(node: Node) -> Node | None:
    """What a call of a layer of ours adds to what it makes of its input."""
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")
    return given if isinstance(given, Node) else None


def activates(node: Node, layer: nn.Module) -> bool:
    """Whether a call of a layer ends with a nonlinearity."""
    carried = getattr(layer, "activation", None) if isinstance(layer, Normalization) else None
    return carried not in (None, "identity") or node.kwargs.get("activation") is not None


def shares_memory(node: Node) -> bool:
    """Whether what a step makes may be the same memory as what it takes."""
    if node.op == "call_module":
        return isinstance(node.meta["call"].module, (*_MOVING_MODULES, *_KEEPING_MODULES))
    return name_of(node) in (*_MOVING, *_TUPLES, *_KEEPING, *CASTING)
