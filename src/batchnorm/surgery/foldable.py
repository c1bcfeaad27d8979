"""Which normalizations can be composed with the layer before them, and why the others cannot."""

from collections import Counter

from torch import nn
from torch.fx import Node
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.layers import BatchNormPerActivation, Normalization
from batchnorm.surgery.graph import Trace
from batchnorm.surgery.outcome import Refusal
from batchnorm.surgery.roles import input_of, role_of, uses_of

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def pairs_of(
    model: nn.Module, traced: Trace, norms: dict[str, nn.Module]
) -> tuple[dict[tuple[str, str], tuple[int, ...]], list[Refusal]]:
    """Affine layers and the normalizations right behind them, as far as the trace proves it.

    Args:
        model: As it was traced.
        traced: With shapes measured.
        norms: By path.

    Returns:
        Pairs of paths, each with the shape of its input, and a refusal for each other normalization.
    """
    nodes: dict[str, list[Node]] = {}
    for node in traced.graph.nodes:
        if node.op == "call_module":
            nodes.setdefault(node.meta["call"].path, []).append(node)
    sharing = _sharing(model)
    pairs: dict[tuple[str, str], tuple[int, ...]] = {}
    refusals: list[Refusal] = []
    for path, norm in norms.items():
        calls = nodes.get(path, [])
        if len(calls) != 1:
            seen = "is not called when the example runs" if not calls else f"is called {len(calls)} times"
            refusals.append(Refusal(path, f"it {seen}"))
            continue
        reason = _norm_reason(norm, calls[0]) or _feeding_reason(model, traced, calls[0])
        feeding = input_of(calls[0])
        affine = feeding.meta["call"].path if feeding is not None else ""
        reason = reason or next((f"{p} {sharing[p]}" for p in (path, affine) if p in sharing), "")
        if reason:
            refusals.append(Refusal(path, reason))
        else:
            pairs[affine, path] = input_of(feeding).meta["shape"]
    return pairs, refusals


def _sharing(model: nn.Module) -> dict[str, str]:
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


def _norm_reason(norm: nn.Module, node: Node) -> str:
    """Why a normalization cannot be folded wherever it stands."""
    value = input_of(node)
    if value is None or len(node.args) > 2 or node.kwargs.get("mask") is not None:
        return "it is called with a mask"
    if value in (*node.args[1:], *node.kwargs.values()):
        return "its input is its residual too"
    if isinstance(norm, BatchNormPerActivation):
        return "it normalizes every activation by itself, which no convolution can do"
    base = next(cls for cls in type(norm).__mro__ if cls.__module__.split(".")[0] in ("torch", "batchnorm"))
    if getattr(type(norm), "forward", None) is not getattr(base, "forward", None):
        return f"{type(norm).__name__} has a forward of its own"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    return _hooks_reason(norm, "it") or _values_reason(norm)


def _values_reason(norm: nn.Module) -> str:
    if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
        return "its running statistics are not finite: recalibrate it first"
    if (norm.running_var < 0).any():
        return "its running variance is negative: recalibrate it first"
    if not all(p.isfinite().all() for p in norm.parameters()):
        return "its weight or bias is not finite"
    return ""


def _hooks_reason(module: nn.Module, name: str) -> str:
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return f"{name} has hooks, which would see other values"
    return f"{name} is parametrized" if is_parametrized(module) else ""


def _feeding_reason(model: nn.Module, traced: Trace, node: Node) -> str:
    """Why what feeds a normalization cannot take it up."""
    feeding = input_of(node)
    name = traced.describe(feeding)
    affine = model.get_submodule(feeding.meta["call"].path) if feeding.op == "call_module" else None
    if isinstance(affine, _TRANSPOSED):
        return f"{name} is a {type(affine).__name__}, which is not folded by this version"
    if not isinstance(affine, _FOLDABLE):
        follows = [traced.describe(u) for u in uses_of(node) if role_of(traced, u) == "affine"]
        later = f"; folding it forward into {follows[0]} is not done by this version" if follows else ""
        return f"it follows {name}, not a convolution or linear layer{later}"
    base = next(cls for cls in _FOLDABLE if isinstance(affine, cls))
    if any(
        getattr(type(affine), f, None) is not getattr(base, f, None) for f in ("forward", "_conv_forward")
    ):
        return f"{name} ({type(affine).__name__}) has a forward of its own"
    others = [user for user in uses_of(feeding) if user is not node]
    if others:
        return f"the output of {name} is also used by {traced.describe(others[0])}"
    if traced.times(name) > 1:
        return f"{name} is called {traced.times(name)} times"
    if any(
        n.op == "get_attr" and str(n.target).startswith((f"{name}.weight", f"{name}.bias"))
        for n in traced.graph.nodes
    ):
        return f"the forward uses parameters of {name} by itself too"
    return _hooks_reason(affine, name) or _dimension_reason(
        affine, model.get_submodule(node.meta["call"].path), feeding
    )


def _dimension_reason(affine: nn.Module, norm: nn.Module, feeding: Node) -> str:
    """Why a normalization is over another dimension than the affine layer's output channels."""
    dims = len(feeding.meta["shape"])
    dim = norm.channel_dim % dims if isinstance(norm, Normalization) else 1
    if isinstance(affine, nn.Linear):
        if dim != dims - 1:
            return (
                f"it normalizes dimension {dim} of the output {feeding.meta['shape']} of {feeding.target}, "
                f"whose features are in the last"
            )
        return ""
    if dims != affine.weight.dim():
        return f"{feeding.target} runs without a batch dimension, so that it normalizes a location"
    return (
        ""
        if dim == 1
        else f"it normalizes the last dimension, but {feeding.target} has its channels in dimension 1"
    )
