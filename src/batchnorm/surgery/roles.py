"""What the steps of a graph do to channels."""

import operator

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from batchnorm.surgery.graph import AFFINE, Trace, is_normalization

_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "affine": AFFINE,
    "reshape": (nn.Flatten, nn.Unflatten),
    "keep": (
        nn.Identity,
        nn.Dropout,
        nn.Dropout1d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.AlphaDropout,
        nn.FeatureAlphaDropout,
    ),
}
_RESHAPES = (
    "reshape",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "movedim",
    "unsqueeze",
    "squeeze",
    "swapaxes",
)
_METHODS = {
    "sum": ("add", "add_"),
    "product": ("mul", "mul_", "multiply"),
    "arithmetic": ("sub", "sub_", "div", "div_"),
    "reshape": (*_RESHAPES, "view", "view_as", "reshape_as"),
    "keep": ("contiguous", "clone", "float", "double", "half", "bfloat16", "to", "type_as"),
}
_FUNCTIONS = {
    "affine": (
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.conv_transpose1d,
        F.conv_transpose2d,
        F.conv_transpose3d,
    ),
    "sum": (operator.add, operator.iadd, torch.add),
    "concatenation": (torch.cat, torch.concat, torch.concatenate),
    "product": (operator.mul, operator.imul, torch.mul, torch.multiply),
    "arithmetic": (operator.sub, operator.isub, operator.truediv, operator.itruediv, torch.sub, torch.div),
    "reshape": tuple(getattr(torch, name) for name in _RESHAPES),
    "keep": (
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        torch.dropout,
    ),
}
# Kept by value: F.max_pool2d and its like are dispatchers whose __name__ is not their own.
_POOLS = frozenset(getattr(F, name) for name in dir(F) if "_pool" in name and not name.startswith("_"))
_NORM_FUNCTIONS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_ASKS_FOR_SHAPE = ("size", "dim", "numel", "shape", "dtype", "device", "ndim")

TRANSPARENT = ("keep", "pool", "reshape", "arithmetic")
"""Roles of the steps through which channels of an affine layer can be followed."""


def role_of(trace: Trace, node: Node) -> str:
    """What a step does to channels.

    Returns:
        ``affine``, ``norm``, ``keep`` (dropout and the like), ``pool``, ``reshape``, ``sum``,
        ``product``, ``concatenation``, ``arithmetic`` (with a number) or ``other``.
    """
    module = trace.module(node)
    if module is not None:
        if is_normalization(module):
            return "norm"
        if "Pool" in type(module).__name__ and type(module).__module__.startswith("torch.nn"):
            return "pool"
        return next((role for role, classes in _MODULES.items() if isinstance(module, classes)), "other")
    if node.op == "call_function":
        if getattr(node.target, "__name__", "") in _NORM_FUNCTIONS:
            return "norm"
        if node.target in _POOLS:
            return "pool"
        role = next((r for r, functions in _FUNCTIONS.items() if node.target in functions), "other")
    else:
        names = _METHODS if node.op == "call_method" else {}
        role = next((r for r, spellings in names.items() if node.target in spellings), "other")
    if role in ("sum", "product", "arithmetic"):
        if sum(isinstance(a, Node) for a in node.args) == 1:
            return "arithmetic"
        return "other" if role == "arithmetic" else role
    return role


def is_max_pool(trace: Trace, node: Node) -> bool:
    """Whether a step is max pooling, which commutes with adding a constant to a channel."""
    module = trace.module(node)
    if module is not None:
        return "MaxPool" in type(module).__name__ and role_of(trace, node) == "pool"
    return node.target in _POOLS and any(
        node.target is getattr(F, name) for name in dir(F) if "max_pool" in name and "unpool" not in name
    )


def input_of(node: Node) -> Node | None:
    """The value that a step works on."""
    return next((a for a in (*node.args, *node.kwargs.values()) if isinstance(a, Node)), None)


def operands_of(node: Node) -> list[Node]:
    """The values that a sum or a concatenation joins."""
    joined = node.args
    if joined and isinstance(joined[0], list | tuple):
        joined = tuple(joined[0])
    elif not joined:
        joined = tuple(node.kwargs.get("tensors", ()))
    return [a for a in joined if isinstance(a, Node)]


def uses_of(node: Node) -> list[Node]:
    """The steps that use what a value contains; asking for its shape is no use."""
    return [user for user in node.users if not _asks_for_shape(user)]


def _asks_for_shape(node: Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _ASKS_FOR_SHAPE
    return node.op == "call_method" and node.target in _ASKS_FOR_SHAPE
