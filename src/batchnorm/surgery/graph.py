"""What feeds what: a model traced with torch.fx, with the shapes and with who called whom."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.surgery import nonlinearities
from batchnorm.surgery.models import copied, fixed_randomness

AFFINE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_NAME = re.compile(r"norm(\dd|alization)?$", re.IGNORECASE)


class Untraceable(Exception):
    """A forward that torch.fx cannot follow; the message is a phrase that says why."""


@dataclass(eq=False)
class Call:
    """One call of a module while the model runs.

    Attributes:
        path: Of the module, in the whole model.
        module: In the traced copy.
        parent: The call whose forward made this one; ``None`` for the outermost.
        position: Number of earlier module calls made by ``parent``.
        args: Positional arguments, as seen while tracing.
        kwargs: Keyword arguments, as seen while tracing.
        result: What the call returned, as seen while tracing.
    """

    path: str
    module: nn.Module
    parent: "Call | None"
    position: int
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    result: Any = None
    num_calls: int = 0
    num_nodes: int = 0

    def chain(self) -> "list[Call]":
        """This call and those around it, innermost first."""
        return [self, *(self.parent.chain() if self.parent else [])]


@dataclass(eq=False)
class Trace:
    """A traced model, or a traced piece of one.

    Attributes:
        root: Copy of the model or piece.
        prefix: Path of ``root`` in the whole model.
        graph: In ``node.meta``: ``call``, the innermost `Call`; ``key``, the node's place among
            those of its call; after `measure`, ``shape``, ``dtype`` and
            ``device`` of its value if that is a tensor, and ``value`` if it is a number or a size.
        calls: In the order in which they began; the first is that of ``root``.
        hooks: Paths of the modules with forward or backward hooks, which the trace leaves out.
        attributes: Paths of the plain attributes that the followed forwards read.
    """

    root: nn.Module
    prefix: str
    graph: fx.Graph
    calls: list[Call]
    hooks: frozenset[str]
    attributes: frozenset[str]

    def __post_init__(self) -> None:
        self._times = Counter(call.path for call in self.calls)

    def times(self, path: str) -> int:
        """How often the module at ``path`` is called."""
        return self._times[path]

    def module(self, node: Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return node.meta["call"].module if node.op == "call_module" else None

    def describe(self, node: Node) -> str:
        """A name for reports: a module's path, or the function and the module that calls it."""
        call: Call = node.meta["call"]
        if node.op == "call_module":
            return call.path
        if node.op in ("placeholder", "output"):
            kind = f"argument {node.target}" if node.op == "placeholder" else "the output"
            return f"{kind} of {call.path or 'the model'}"
        name = (
            node.target
            if isinstance(node.target, str)
            else getattr(node.target, "__name__", str(node.target))
        )
        return f"{name} in {call.path}" if call.path else str(name)

    def measure(self, inputs: Sequence[Any]) -> None:
        """Note the shape of every tensor when the placeholders take ``inputs``, in evaluation mode."""
        # A copy: a forward may write into parameters, and a trace shares them with the user's model.
        runner = copied(self.root).eval()
        with torch.no_grad(), fixed_randomness(runner):
            _Measure(runner, graph=self.graph).run(*inputs)


class _Measure(fx.Interpreter):
    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"], n.meta["dtype"], n.meta["device"] = tuple(value.shape), value.dtype, value.device
        elif isinstance(value, bool | int | float | torch.Size):
            n.meta["value"] = value
        return value


def is_normalization(module: nn.Module) -> bool:
    """Whether a module normalizes: torch's own classes, and others of such a name without weights inside."""
    if isinstance(module, _NORMS):
        return True
    return bool(_NORM_NAME.search(type(module).__name__)) and not any(
        isinstance(inner, AFFINE) for inner in module.modules()
    )


def is_leaf(module: nn.Module, own: tuple[type, ...] = ()) -> bool:
    """Whether a module's call is one step of the graph; ``own`` are further classes of which this is so."""
    if isinstance(module, nn.Sequential):
        return False
    return (
        type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))
        or isinstance(module, (*AFFINE, *own, torch.jit.ScriptModule))
        or nonlinearities.is_nonlinear_module(module)
        or is_normalization(module)
    )


def join(*parts: str) -> str:
    """A path from its parts, of which any may be empty (the model itself)."""
    return ".".join(part for part in parts if part)
