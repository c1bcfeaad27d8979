"""A model's forward followed with torch.fx, so that later steps can trust what it shows."""

import inspect
import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node, Proxy

from batchnorm.surgery.graph import Call, Trace, Untraceable, is_leaf, join
from batchnorm.surgery.models import skeleton

_MOST_OF_A_MESSAGE = 160
IN_PLACE_OPERATORS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
"""Names in `operator` of the steps that overwrite their first argument."""


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool | None,
    prefix: str = "",
    own: tuple[type, ...] = (),
    inline: Collection[str] | None = None,
) -> tuple[Trace, list[Any]]:
    """Follow the forward of a copy of ``model``.

    Args:
        model: Not changed.
        args: Positional arguments; a tensor (or, from another trace, a proxy) stands for any
            value, everything else is taken as fixed, and asserted in the graph.
        kwargs: Keyword arguments, likewise.
        training: The mode in which the forward is followed; ``None`` for that of each module.
        prefix: Path of ``model`` in the whole model.
        own: Classes of the user's that are one step, as torch's layers are.
        inline: Paths below ``model`` of the only modules to be followed; ``None`` for all.

    Returns:
        The trace, and what its placeholders stand for.

    Raises:
        Untraceable: torch.fx cannot follow the forward.
    """
    twin = skeleton(model)
    if training is not None:
        twin.train(training)
    hooks = set()
    for path, module in twin.named_modules():
        for of_one_kind in hooks_of(module):
            if of_one_kind:
                hooks.add(join(prefix, path))
            # Hooks are the user's Python code and need not understand proxies.
            of_one_kind.clear()

    def stop(module: nn.Module, path: str) -> bool:
        return is_leaf(module, own) or (inline is not None and path not in inline)

    read: set[str] = set()
    for path, module in twin.named_modules():
        if not path or not stop(module, path):
            _watch(module, path, read)
    tracer = _Tracer(stop, prefix, args, dict(kwargs or {}))
    try:
        graph = tracer.trace(twin)
    except Exception as error:  # the user's forward may raise anything when it meets a proxy
        raise Untraceable(_phrase(error)) from error
    return Trace(twin, prefix, graph, tracer.calls, frozenset(hooks), frozenset(read)), tracer.inputs


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The hooks of a module that see values: before and after its forward, and in the backward pass."""
    return [
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    ]


def _watch(module: nn.Module, path: str, read: set[str]) -> None:
    """Note every number, flag or word that the code of a followed module reads from it."""
    cls = type(module)

    def note(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        is_plain = isinstance(value, bool | int | float | str | list | tuple | dict)
        if is_plain and not name.startswith("_") and name not in ("training", "forward_source"):
            read.add(join(path, name))
        return value

    # A subclass of the same name: super() and isinstance in the user's code work as before.
    module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": note, "__module__": cls.__module__})


def _phrase(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    shown = text if len(text) <= _MOST_OF_A_MESSAGE else text[:_MOST_OF_A_MESSAGE] + "…"
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def expect(got: Any, value: Any, name: str) -> None:
    """Refuse an argument for which a traced forward was not made.

    Raises:
        ValueError: ``got`` is not ``value``.
    """
    if got is not value and got != value:
        raise ValueError(
            f"argument {name} is {got!r}, but this forward was traced with {value!r}; "
            f"operate again on the original model with an example that gives {name}={got!r}"
        )


class _Tracer(fx.Tracer):
    """Records who called whom, and keeps arguments that are not tensors fixed."""

    def __init__(
        self,
        stop: Callable[[nn.Module, str], bool],
        prefix: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self._stop, self._prefix, self._args, self._kwargs = stop, prefix, args, kwargs
        self.calls: list[Call] = []
        self.inputs: list[Any] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._stop(m, module_qualified_name)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        outermost = Call(self._prefix, self.root, None, 0)
        self.calls.append(outermost)
        self._call = outermost
        bound = inspect.signature(root_fn).bind(self.root, *self._args, **self._kwargs)
        bound.apply_defaults()
        parameters = list(bound.signature.parameters.values())[1:]
        for parameter in parameters:
            value = bound.arguments[parameter.name]
            # One placeholder for each of the values behind *args and **kwargs.
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                value = tuple(self._input(f"{parameter.name}_{i}", v) for i, v in enumerate(value))
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                value = {name: self._input(name, v) for name, v in value.items()}
            else:
                value = self._input(parameter.name, value, parameter.default)
            bound.arguments[parameter.name] = value
        outermost.args, outermost.kwargs, outermost.num_nodes = bound.args[1:], bound.kwargs, 0
        return (lambda: root_fn(*bound.args, **bound.kwargs)), []

    def _input(self, name: str, value: Any, default: Any = inspect.Parameter.empty) -> Any:
        self.inputs.append(value)
        given = () if default is inspect.Parameter.empty else (default,)
        return self._unfold(self.create_proxy("placeholder", name, given, {}), value, name)

    def _unfold(self, proxy: Proxy, value: Any, name: str) -> Any:
        """A container of proxies instead of a proxy of a container, which could not be iterated."""
        if isinstance(value, Tensor | Proxy):
            return proxy
        if _holds_a_tensor(value):
            if isinstance(value, Mapping):
                return {key: self._unfold(proxy[key], v, f"{name}[{key!r}]") for key, v in value.items()}
            inner = [self._unfold(proxy[i], v, f"{name}[{i}]") for i, v in enumerate(value)]
            return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
        self.create_proxy("call_function", expect, (proxy, value, name), {})
        return value

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if m not in self.submodule_paths:
            # Made inside forward, as in nn.ReLU()(x): what it computes is the caller's.
            return forward(*args, **kwargs)
        parent = self._call
        path = join(self._prefix, self.path_of_module(m))
        call = Call(path, m, parent, parent.num_calls, args, kwargs)
        parent.num_calls += 1
        self.calls.append(call)
        self._call = call
        try:
            call.result = super().call_module(m, forward, args, kwargs)
        finally:
            self._call = parent
        return call.result

    def get_fresh_qualname(self, prefix: str) -> str:
        # torch.fx counts on from trace to trace; two traces of one module must use the same names.
        names = (f"{prefix}{i}" for i in itertools.count())
        return next(name for name in names if not hasattr(self.root, name))

    def proxy(self, node: Node) -> Proxy:
        return _Proxy(node, self)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(kind, *args, **kwargs)
        call = node.meta["call"] = self._call
        # Parameters are looked up once a trace, wherever that happens to be: they do not count.
        if kind not in ("placeholder", "get_attr", "output"):
            node.meta["key"] = (tuple(c.position for c in call.chain()[:-1]), call.num_nodes)
            call.num_nodes += 1
        return node


class _Proxy(Proxy):
    """Writes ``x += y`` down as what it is: an operation that overwrites x."""


def _in_place(name: str) -> Callable[[Proxy, Any], Proxy]:
    def operate(self: Proxy, other: Any) -> Proxy:
        proxy: Proxy = self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})
        return proxy

    return operate


for _name in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


def _holds_a_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_a_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_a_tensor, value))
    return isinstance(value, Tensor | Proxy)
