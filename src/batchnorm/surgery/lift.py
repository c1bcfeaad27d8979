"""Exported programs with their layers put back: operators with parameters become modules again."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

_CONVOLUTIONS: dict[str, type[nn.Module]] = {
    **{f"conv{d}d": getattr(nn, f"Conv{d}d") for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": getattr(nn, f"ConvTranspose{d}d") for d in (1, 2, 3)},
}
_NORMS: dict[int, type[nn.Module]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def is_exported(model: nn.Module) -> bool:
    """Whether a module is a graph of operators, as ``torch.export`` makes them."""
    return isinstance(model, fx.GraphModule) and any(_operator(n) for n in model.graph.nodes)


def lifted(model: fx.GraphModule) -> fx.GraphModule:
    """A copy in which convolutions, linear layers and batch normalizations are modules, in evaluation.

    Parameters keep their names. The checks of an exported program's inputs are left out.

    Args:
        model: Not changed.

    Raises:
        ValueError: A normalization was exported in training mode.
    """
    twin = copy.deepcopy(model)
    graph = twin.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith("_guards"):
            graph.erase_node(node)
            continue
        make = _MAKERS.get(_operator(node))
        if make is None:
            continue
        given = _named(node)
        tensors = {n: _tensor(twin, v) for n, v in given.items() if isinstance(v, Node) and n != "input"}
        if any(t is None for t in tensors.values()):
            continue
        first = given.get("weight") or given.get("running_mean")
        if not isinstance(first, Node):
            continue
        path = str(first.target).rpartition(".")[0] or node.name
        layer = make({**given, **tensors})
        if layer is None or not _put(twin, path, layer):
            continue
        with graph.inserting_before(node):
            called = graph.call_module(path, (given["input"],))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    made = fx.GraphModule(twin, graph)
    made.training = False
    for module in made.modules():
        module.training = False
    return made


def _operator(node: Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return ""
    return node.target.__name__.split(".")[0]


def _named(node: Node) -> dict[str, Any]:
    arguments = node.target._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given.update(zip((a.name for a in arguments), node.args, strict=False))
    return {**given, **node.kwargs}


def _tensor(model: nn.Module, node: Node) -> Tensor | None:
    if node.op != "get_attr":
        return None
    holder, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(holder), name)
    return tensor


def _convolution(kind: str) -> Callable[[dict[str, Any]], nn.Module | None]:
    def make(given: dict[str, Any]) -> nn.Module | None:
        weight, bias, groups = given["weight"], given["bias"], given["groups"]
        transposed = kind.startswith("conv_transpose")
        first, second = weight.shape[0], weight.shape[1] * groups
        ins, outs = (first, second) if transposed else (second, first)
        dims = weight.dim() - 2
        names = ("stride", "padding", "dilation", *(("output_padding",) if transposed else ()))
        # An operator takes one number for all dimensions too.
        options = {
            n: tuple(v) * dims if isinstance(v, list | tuple) and len(v) == 1 else v
            for n, v in ((n, given[n]) for n in names)
        }
        options = {n: tuple(v) if isinstance(v, list) else v for n, v in options.items()}
        layer = _CONVOLUTIONS[kind](
            ins, outs, tuple(weight.shape[2:]), groups=groups, bias=bias is not None, device="meta", **options
        )
        return _filled(layer, weight=weight, bias=bias)

    return make


def _linear(given: dict[str, Any]) -> nn.Module | None:
    weight, bias = given["weight"], given["bias"]
    if weight.dim() != 2:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    return _filled(layer, weight=weight, bias=bias)


def _norm(given: dict[str, Any]) -> nn.Module | None:
    mean, weight = given["running_mean"], given["weight"]
    shape = given["input"].meta["val"].shape if "val" in given["input"].meta else ()
    if given["training"]:
        raise ValueError(
            "fold needs running statistics in use, but the program was exported in training mode: "
            "call model.eval() before torch.export.export"
        )
    if mean is None or len(shape) not in _NORMS or (weight is None) != (given["bias"] is None):
        return None
    layer = _NORMS[len(shape)](mean.numel(), eps=given["eps"], affine=weight is not None, device="meta")
    named = {n: given[n] for n in ("weight", "bias", "running_mean", "running_var")}
    return _filled(layer, **named, num_batches_tracked=torch.zeros((), dtype=torch.long))


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is not None:
            holder: dict[str, Any] = layer._parameters if name in layer._parameters else layer._buffers
            holder[name] = tensor
    return layer


_MAKERS: dict[str, Callable[[dict[str, Any]], nn.Module | None]] = {
    **{kind: _convolution(kind) for kind in _CONVOLUTIONS},
    "linear": _linear,
    "batch_norm": _norm,
}


def _put(model: nn.Module, path: str, layer: nn.Module) -> bool:
    """Put a layer where its parameters were; false where something else is there."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    there = parent._modules.get(name)
    if there is not None and type(there) is not nn.Module:
        return type(there) is type(layer) and repr(there) == repr(layer)
    setattr(parent, name, layer)
    return True
