"""Activations and sums moved into the normalizations before them, with as little changed as can be."""

from collections.abc import Sequence

from torch import nn
from torch.fx import Node

from batchnorm.surgery.fusible import Evaluation, Fusion
from batchnorm.surgery.graph import Call, Untraceable
from batchnorm.surgery.rewrite import (
    Graphs,
    caller_of,
    calls_between,
    edge,
    graphs_of,
    innermost_single,
    install,
    methods_of,
    remark_on,
)


def fuse_all(
    model: nn.Module, fusions: Sequence[Fusion], evaluation: Evaluation
) -> tuple[dict[Fusion, str], dict[str, str]]:
    """Fuse in a model whose normalizations are all ours.

    Where one forward calls the normalization and then the activation, each a module that is called
    once, and no other method of that class might call them otherwise, the layer carries the
    activation and an ``nn.Identity`` takes its place. Otherwise the forward of the innermost module
    around that runs once is rewritten from its graph, in which the layer is told its activation and
    residual call by call.

    Args:
        model: Changed in place; of the same structure as the traced one.
        fusions: In the order of the forward pass.
        evaluation: What happens in evaluation mode.

    Returns:
        The fusions that could not be done, each with the reason, and remarks by path.
    """
    homes: dict[Fusion, Call | None] = {
        fusion: None
        if _can_carry(model, fusion, evaluation)
        else innermost_single(fusion.trace, fusion.steps)
        for fusion in fusions
    }
    _settle(homes)
    for fusion in [fusion for fusion, home in homes.items() if home is None]:
        _carry(model, fusion)
    refused: dict[Fusion, str] = {}
    remarks: dict[str, str] = {}
    for home in dict.fromkeys(home for home in homes.values() if home is not None):
        inside = [fusion for fusion in fusions if homes[fusion] is home]
        _rewrite(model, home, inside, refused, remarks)
    return refused, remarks


def _settle(homes: dict[Fusion, Call | None]) -> None:
    """Let everything inside a module that will be followed be done where it is followed from."""
    moved = True
    while moved:
        opened = {
            inner: home
            for fusion, home in homes.items()
            if home is not None
            for step in fusion.steps
            for inner in calls_between(step, home)
        }
        moved = False
        for fusion, home in homes.items():
            place = caller_of(fusion.steps) if home is None else home
            if place in opened:
                homes[fusion], moved = opened[place], True


def _can_carry(model: nn.Module, fusion: Fusion, evaluation: Evaluation) -> bool:
    """Whether the layer can carry the activation and nothing need be rewritten."""
    norm, act = fusion.norm.meta["call"], fusion.act.meta["call"]
    traces = (fusion.trace, *evaluation.traces)
    if fusion.add is not None or fusion.act.op != "call_module" or norm.parent is not act.parent:
        return False
    if methods_of(type(model.get_submodule(norm.parent.path))):
        # Another method may call the layer without the activation, and must go on as before.
        return False
    if any(trace.times(norm.path) > 1 for trace in traces):
        return False
    if _in_sequential(fusion):
        return True
    module = model.get_submodule(act.path)
    registered = sum(m is module for _, m in model.named_modules(remove_duplicate=False))
    both = (norm.path in evaluation.called) == (act.path in evaluation.called)
    return both and registered == 1 and all(trace.times(act.path) <= 1 for trace in traces)


def _in_sequential(fusion: Fusion) -> bool:
    """Whether the activation is an entry of a plain Sequential that runs once: one entry is one call."""
    parent = fusion.act.meta["call"].parent
    is_plain = type(parent.module).forward is nn.Sequential.forward
    return is_plain and fusion.trace.times(parent.path) == 1


def _carry(model: nn.Module, fusion: Fusion) -> None:
    norm, act = fusion.norm.meta["call"], fusion.act.meta["call"]
    parent = act.parent
    vars(model.get_submodule(norm.path))["activation"] = fusion.activation
    if _in_sequential(fusion):
        children = model.get_submodule(parent.path)._modules
        name = list(children)[act.position]
        children[name] = nn.Identity().train(children[name].training)
    else:
        path, _, name = act.path.rpartition(".")
        old = model.get_submodule(act.path)
        setattr(model.get_submodule(path), name, nn.Identity().train(old.training))


def _rewrite(
    model: nn.Module,
    home: Call,
    fusions: Sequence[Fusion],
    refused: dict[Fusion, str],
    remarks: dict[str, str],
) -> None:
    whole = fusions[0].trace
    steps = [step for fusion in fusions for step in fusion.steps]
    edges = [edge(value, user) for f in fusions for value, user in zip(f.steps, f.steps[1:], strict=False)]
    try:
        graphs = graphs_of(whole, home, steps, edges)
    except (ValueError, Untraceable) as why:
        reason = f"the forward of {home.path or 'the model'} would have to be rewritten, but {why}"
        refused.update(dict.fromkeys(fusions, reason))
        return
    for fusion in fusions:
        for number in range(len(graphs.traces)):
            _fuse(graphs, number, fusion)
    module = model.get_submodule(home.path)
    remarks[home.path] = remark_on(module, graphs)
    install(module, graphs)


def _fuse(graphs: Graphs, number: int, fusion: Fusion) -> None:
    """Let one call do the work of two or three steps, in one graph, if its mode has all of them."""
    graph = graphs.traces[number].graph
    norm, *_, act = twins = [graphs.twin(number, step) for step in fusion.steps]
    if norm is None or act is None or None in twins:
        return
    options: dict[str, Node | str] = {"activation": fusion.activation}
    before = norm
    if fusion.add is not None:
        before = next(user for user in norm.users)
        options["residual"] = next(value for value in before.all_input_nodes if value is not norm)
    with graph.inserting_before(before):
        fused = graph.call_module(str(norm.target), norm.args, options)
    act.replace_all_uses_with(fused)
    for step in dict.fromkeys((act, before, norm)):
        graph.erase_node(step)
