"""Which layers can take part in folding, wherever they stand, and why the others cannot."""

from collections import Counter

from torch import nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.surgery.frozen_class import is_frozen_by_class
from batchnorm.surgery.graph import AFFINE, Trace
from batchnorm.surgery.roles import input_of

_OWN_METHODS = ("forward", "_conv_forward", "_output_padding")


def sharing(model: nn.Module) -> dict[str, str]:
    """Modules that share something with others, by path, with what they share."""
    modules = list(model.named_modules(remove_duplicate=False))
    times = Counter(id(module) for _, module in modules)
    owners: Counter[int] = Counter()
    for module in model.modules():
        owners.update({id(p) for p in module.parameters(recurse=False)})
    found = {}
    for path, module in modules:
        if times[id(module)] > 1:
            found[path] = f"is registered under {times[id(module)]} names"
        elif any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
            found[path] = "shares a parameter with another module"
    return found


def norm_obstacle(path: str, norm: nn.Module, calls: list[Node], trace: Trace) -> str:
    """Why a normalization is no fixed map, or not one that can be taken from its place; empty if it is."""
    if not calls:
        return "it is not called when the example runs"
    for node in calls:
        value = input_of(node)
        if value is None or len(node.args) > 2 or node.kwargs.get("mask") is not None:
            return "it is called with a mask"
        if value in (*node.args[1:], *node.kwargs.values()):
            return "its input is its residual too"
    frozen = is_frozen_by_class(norm)
    if not frozen:
        ours = ("torch", "batchnorm")
        base = next(cls for cls in type(norm).__mro__ if cls.__module__.split(".")[0] in ours)
        if getattr(type(norm), "forward", None) is not getattr(base, "forward", None):
            return f"{type(norm).__name__} has a forward of its own"
    if "forward" in vars(norm):
        return "it has a forward of its own, set on the object"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if getattr(norm, "mixes", ""):
        return str(norm.mixes)
    return _hooks_obstacle(norm, "it") or _reads_obstacle(trace, path, "it") or _values_obstacle(norm)


def _values_obstacle(norm: nn.Module) -> str:
    if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
        return "its running statistics are not finite: recalibrate it first"
    if (norm.running_var < 0).any():
        return "its running variance is negative: recalibrate it first"
    tensors = [t for t in (norm.weight, norm.bias) if t is not None]
    if not all(t.isfinite().all() for t in tensors):
        return "its weight or bias is not finite"
    if any(t.shape != norm.running_mean.shape for t in (*tensors, norm.running_var)):
        return "its statistics and its weight differ in length"
    return ""


def affine_obstacle(path: str, affine: nn.Module, trace: Trace, shared: dict[str, str]) -> str:
    """Why a convolution or linear layer must stay as it is; empty if it need not."""
    base = next(cls for cls in AFFINE if isinstance(affine, cls))
    own = any(getattr(type(affine), f, None) is not getattr(base, f, None) for f in _OWN_METHODS)
    if own or "forward" in vars(affine):
        return f"{path} ({type(affine).__name__}) has a forward of its own"
    if not affine.weight.is_floating_point():
        return f"the weight of {path} is not floating point"
    reason = _reads_obstacle(trace, path, path) or _hooks_obstacle(affine, path)
    return reason or (f"{path} {shared[path]}" if path in shared else "")


def _reads_obstacle(trace: Trace, path: str, name: str) -> str:
    start = f"{path}." if path else ""
    if any(n.op == "get_attr" and str(n.target).startswith(start) for n in trace.graph.nodes):
        return f"the forward uses parameters of {name} by itself too"
    return ""


def _hooks_obstacle(module: nn.Module, name: str) -> str:
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{name} has hooks, which would see other values"
    return f"{name} is parametrized" if is_parametrized(module) else ""
