"""The nonlinearities that are recognized, however a model spells them."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

# Softmax is not here: it mixes features, so it is an output distribution, not g of section 3.2.
_CLASSES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": nn.Hardtanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "logsigmoid": nn.LogSigmoid,
    "rrelu": nn.RReLU,
}
KNOWN = tuple(_CLASSES)

_BY_CLASS: dict[type, str] = {cls: name for name, cls in _CLASSES.items()}
# ``relu_`` is the in-place twin of ``relu``; both torch and torch.nn.functional hold some of each.
_BY_FUNCTION: dict[Callable, str] = {
    getattr(home, spelling): name
    for name in KNOWN
    for spelling in (name, name + "_")
    for home in (F, torch)
    if hasattr(home, spelling)
} | {torch.special.expit: "sigmoid"}
_BY_METHOD: dict[str, str] = {
    spelling: name for name in KNOWN for spelling in (name, name + "_") if hasattr(torch.Tensor, spelling)
}

Choice = str | type | Callable | Iterable["str | type | Callable"]


def kind_of(node: Node, module: nn.Module | None, own: tuple[type, ...] = ()) -> str | None:
    """The name of the nonlinearity that a traced call computes, or ``None``.

    Args:
        node: The call.
        module: The called module, when it is a module's call.
        own: Classes of the user's that count as nonlinearities, under the class's name.
    """
    if module is not None:
        return kind_of_module(module, own)
    if node.op == "call_function":
        return _BY_FUNCTION.get(node.target)
    return _BY_METHOD.get(node.target) if node.op == "call_method" else None


def kind_of_module(module: nn.Module, own: tuple[type, ...] = ()) -> str | None:
    """The name of the nonlinearity that a module is, or ``None``; ``own`` as in `kind_of`."""
    if isinstance(module, own):
        return next(cls.__name__ for cls in own if isinstance(module, cls))
    return next((_BY_CLASS[cls] for cls in type(module).__mro__ if cls in _BY_CLASS), None)


def module_of(name: str) -> nn.Module:
    """A module of torch's that computes the nonlinearity of a name, with torch's default settings."""
    return _CLASSES[name]()


def is_nonlinear_module(module: nn.Module) -> bool:
    """Whether a module is one of torch's nonlinearities, or a subclass of one."""
    return isinstance(module, tuple(_BY_CLASS))


def works_in_place(node: Node, module: nn.Module | None) -> bool:
    """Whether a nonlinearity overwrites its input."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    # functional.relu(x, inplace) and its like; elu and others have a constant in second place.
    second = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], bool) else False
    return name.endswith("_") or bool(node.kwargs.get("inplace", second))


def chosen(choice: Choice, argument: str) -> tuple[frozenset[str], tuple[type, ...]]:
    """Names and user classes that a ``before=`` or ``after=`` stands for.

    Args:
        choice: ``"all"``, a name, a module class, a function, or several of these.
        argument: The argument's name, for error messages.

    Returns:
        Names as `kind_of` gives them, and the module classes outside torch among the choice.

    Raises:
        ValueError: An entry is not known.
    """
    entries = [choice] if isinstance(choice, str | type) or callable(choice) else list(choice)
    names: set[str] = set()
    own: list[type] = []
    for entry in entries:
        if entry == "all":
            names.update(KNOWN)
        elif isinstance(entry, str) and entry in _CLASSES:
            names.add(entry)
        elif isinstance(entry, type) and entry in _BY_CLASS:
            names.add(_BY_CLASS[entry])
        elif isinstance(entry, type) and issubclass(entry, nn.Module) and not _is_torch(entry):
            own.append(entry)
            names.add(entry.__name__)
        elif not isinstance(entry, str | type) and entry in _BY_FUNCTION:
            names.add(_BY_FUNCTION[entry])
        else:
            shown = entry if isinstance(entry, str) else getattr(entry, "__name__", entry)
            raise ValueError(
                f"{argument}={shown!r} is not a nonlinearity known here; give 'all', a name, the torch class "
                f"or function of one, or a module class of your own; the names are {', '.join(KNOWN)}"
            )
    return frozenset(names), tuple(own)


def _is_torch(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "torch"
