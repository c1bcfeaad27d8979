"""Biases that a following normalization makes useless."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from torch import nn
from torch.fx import Node

from batchnorm.surgery.graph import AFFINE, Trace
from batchnorm.surgery.places import Place
from batchnorm.surgery.roles import is_max_pool, uses_of


def remove(
    model: nn.Module, traces: Sequence[Trace], places: Sequence[Place]
) -> tuple[list[str], dict[str, str]]:
    """Set to ``None`` each bias all of whose effect a normalization subtracts.

    That is so where every use of the affine layer's output goes straight into a normalization,
    possibly through max pooling, which commutes with adding a constant.

    Args:
        model: Changed in place.
        traces: All of what runs.
        places: Where normalizations were put.

    Returns:
        Paths of the affine layers without bias now, and of those that keep it with the reason.
    """
    covered = {
        (place.producer, consumer) for place in places if not place.after for consumer in place.consumers
    }
    served = {place.affine for place in places if not place.after}
    parameters = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    removed: list[str] = []
    kept: dict[str, str] = {}
    for trace in traces:
        calls: dict[str, list[Node]] = defaultdict(list)
        for node in trace.graph.nodes:
            if node.op == "call_module" and isinstance(trace.module(node), AFFINE):
                calls[node.meta["call"].path].append(node)
        direct = {trace.describe(node) for node in trace.graph.nodes if node.op == "get_attr"}
        for path, nodes in calls.items():
            module = model.get_submodule(path)
            if module.bias is None or not served.intersection(nodes):
                continue
            reason = _own_reason(module)
            if parameters[id(module.bias)] > 1 and not _is_one_module(model, module):
                reason = "another layer uses the same parameter"
            if f"{path}.bias" in direct:
                reason = "the forward uses it by itself too"
            for node in nodes:
                reason = reason or _other_use(trace, node, covered)
            if reason:
                kept[path] = f"kept: {reason}"
            else:
                module.register_parameter("bias", None)
                removed.append(path)
    return removed, kept


def _own_reason(module: nn.Module) -> str:
    base = next(cls for cls in AFFINE if isinstance(module, cls))
    if type(module).forward is not base.forward:
        return f"{type(module).__name__} has a forward of its own"
    if "bias" not in module._parameters:
        return "it is parametrized"
    if module._forward_hooks or module._forward_pre_hooks:
        return "the layer has forward hooks, which may see it"
    return ""


def _is_one_module(model: nn.Module, module: nn.Module) -> bool:
    holders = {id(m) for m in model.modules() if any(p is module.bias for p in m.parameters(recurse=False))}
    return len(holders) == 1


def _other_use(trace: Trace, node: Node, covered: set[tuple[Node, Node]]) -> str:
    """A use of a value that no normalization covers, as a phrase; empty if there is none."""
    for user in uses_of(node):
        if (node, user) in covered:
            continue
        if user.op == "output":
            return "its output is also returned"
        if not is_max_pool(trace, user):
            return f"its output goes into {trace.describe(user)} as it is"
        deeper = _other_use(trace, user, covered)
        if deeper:
            return deeper
    return ""
