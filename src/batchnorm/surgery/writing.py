"""Steps that write into values which others may hold."""

import inspect
import operator
from collections.abc import Iterator

from torch.fx import Node

from batchnorm.surgery.steps import name_of, shares_memory
from batchnorm.surgery.tracer import IN_PLACE_OPERATORS

_IN_PLACE = (operator.setitem, *(getattr(operator, name) for name in IN_PLACE_OPERATORS))


def overwritten(value: Node) -> Iterator[Node]:
    """The steps that write into a value, or into what may be the same memory."""
    todo, seen = [value], {value}
    while todo:
        for user in todo.pop().users:
            if _writes(user):
                yield user
            if shares_memory(user) and user not in seen:
                seen.add(user)
                todo.append(user)


def _writes(node: Node) -> bool:
    name = name_of(node)
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
