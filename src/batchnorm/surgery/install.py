"""Normalizations put where they belong, with as little of the user's model changed as can be."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import Node, Proxy

from batchnorm.surgery.graph import Call, Trace, Untraceable, join
from batchnorm.surgery.places import Place
from batchnorm.surgery.rewrite import (
    caller_of,
    edges_of,
    graphs_of,
    innermost_single,
    install,
    put,
    relative,
    remark_on,
    steps_of,
)
from batchnorm.surgery.roles import uses_of


@dataclass(eq=False)
class Site:
    """A place, and the layer that goes there.

    Attributes:
        trace: In which the place was found.
        place: Where.
        layer: Not yet in the model.
        nonlinearity: The step for whose sake it goes there.
        path: Of the layer in the model, once it is there.
        reason: Why it could not be put there.
    """

    trace: Trace
    place: Place
    layer: nn.Module
    nonlinearity: Node
    path: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Addition:
    """A new child of a Sequential, at its ``position``-th child."""

    sequential: Call
    position: int
    behind: bool
    site: Site


def put_all(model: nn.Module, sites: Sequence[Site], own: tuple[type, ...]) -> dict[str, str]:
    """Put every layer in; each site gets its ``path`` or its ``reason``.

    Tried in this order: a new child of a plain ``nn.Sequential`` that runs once; the neighbouring
    module, where it runs once, inside a small ``nn.Sequential``; the forward of the innermost
    module around that runs once, rewritten from its graph.

    Args:
        model: Changed in place; of the same structure as the traced one.
        sites: In the order of the forward pass.
        own: Classes of the user's that are one step.

    Returns:
        The modules with a rewritten forward, each with a remark.
    """
    additions: dict[Call, list[_Addition]] = {}
    rewritten: dict[Call, list[Site]] = {}
    for site in sites:
        addition = _addition(site)
        if addition is not None:
            additions.setdefault(addition.sequential, []).append(addition)
            continue
        wrapped = next((c for c in _neighbours(site) if _can_be_wrapped(model, site.trace, c)), None)
        if wrapped is not None:
            _wrap(model, wrapped, site)
        else:
            rewritten.setdefault(innermost_single(site.trace, steps_of(site.place)), []).append(site)
    for parent, wanted in additions.items():
        _add_children(model.get_submodule(parent.path), parent.path, wanted)
    remarks = {}
    for call, inside in rewritten.items():
        remark = _rewrite(model, call, inside, own)
        if remark:
            remarks[call.path] = remark
    return remarks


def _addition(site: Site) -> _Addition | None:
    """The Sequential in which the layer can go beside the nonlinearity, or behind what is normalized."""
    for call in _neighbours(site):
        if call.parent is not None and _is_sequential(site.trace, call.parent):
            return _Addition(call.parent, call.position, site.place.after, site)
    producer = site.place.producer
    call = producer.meta["call"]
    alone = producer.op == "call_module" and set(uses_of(producer)) <= set(site.place.consumers)
    if alone and call.parent is not None and _is_sequential(site.trace, call.parent):
        return _Addition(call.parent, call.position, True, site)
    return None


def _neighbours(site: Site) -> Iterator[Call]:
    """Calls of one tensor before (or after) which the layer could go without changing what it does.

    The nonlinearity itself, if it is a module; then the modules around it, as long as it is the
    first (or last) thing in them: a SiLU written by hand is better left alone inside.
    """
    place = site.place
    steps = steps_of(place)
    start = steps[0].meta["call"] if len(steps) == 1 else caller_of(steps)
    for call in start.chain():
        if call.parent is None:
            return
        if place.after:
            inside = [user for user in place.producer.users if call in user.meta["call"].chain()]
            if isinstance(call.result, Proxy) and call.result.node is place.producer and not inside:
                yield call
        elif call not in place.producer.meta["call"].chain():
            inside = [user for user in place.producer.users if call in user.meta["call"].chain()]
            alone = len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Proxy)
            if alone and call.args[0].node is place.producer and set(inside) <= set(place.consumers):
                yield call


def _is_sequential(trace: Trace, call: Call) -> bool:
    module = call.module
    is_plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_plain and trace.times(call.path) == 1


def _can_be_wrapped(model: nn.Module, trace: Trace, call: Call) -> bool:
    """Whether a module can go inside a Sequential: not if that renamed entries of the state dict."""
    module = model.get_submodule(call.path)
    stateless = not any(True for _ in module.parameters()) and not any(True for _ in module.buffers())
    registered = sum(m is module for _, m in model.named_modules(remove_duplicate=False))
    return stateless and registered == 1 and trace.times(call.path) == 1


def _wrap(model: nn.Module, call: Call, site: Site) -> None:
    parent_path, _, name = call.path.rpartition(".")
    parent = model.get_submodule(parent_path)
    module = model.get_submodule(call.path)
    reshapes = site.place.consumers[0].meta["call"] is call and site.place.because
    pair = [("bn", site.layer), ("then" if reshapes else "act", module)]
    wrapped = nn.Sequential(OrderedDict(reversed(pair) if site.place.after else pair))
    wrapped.training = module.training
    site.layer.train(module.training)
    setattr(parent, name, wrapped)
    site.path = f"{call.path}.bn"


def _add_children(sequential: nn.Module, path: str, wanted: Sequence[_Addition]) -> None:
    old = dict(sequential._modules)
    taken = set(old)
    children: list[tuple[str, nn.Module | None]] = []
    for position, (name, child) in enumerate(old.items()):
        here = [addition for addition in wanted if addition.position == position]
        sides: dict[bool, list[tuple[str, nn.Module | None]]] = {False: [], True: []}
        for addition in here:
            new = _free(f"{name}_bn", taken)
            taken.add(new)
            sides[addition.behind].append((new, addition.site.layer))
            addition.site.path = join(path, new)
            addition.site.layer.train(sequential.training)
        children += [*sides[False], (name, child), *sides[True]]
    sequential._modules.clear()
    sequential._modules.update(children)


def _free(name: str, taken: set[str]) -> str:
    names = [name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))]
    return next(n for n in names if n not in taken)


def _rewrite(model: nn.Module, call: Call, sites: Sequence[Site], own: tuple[type, ...]) -> str:
    whole = sites[0].trace
    try:
        steps = [node for site in sites for node in steps_of(site.place)]
        edges = [edge for site in sites for edge in edges_of(site.place)]
        graphs = graphs_of(whole, call, steps, edges, own)
    except (ValueError, Untraceable) as why:
        for site in sites:
            site.reason = f"the forward of {call.path or 'the model'} would have to be rewritten, but {why}"
        return ""
    module = model.get_submodule(call.path)
    for site in sites:
        name = _free(_name(site, call), {*dir(module), *module._modules})
        module.add_module(name, site.layer)
        site.layer.train(module.training)
        put(graphs, site.place, name)
        site.path = join(call.path, name)
    remark = remark_on(module, graphs)
    install(module, graphs)
    return remark


def _name(site: Site, outer: Call) -> str:
    affine: Node = site.place.affine
    inside = outer in affine.meta["call"].chain()
    if affine.op == "call_module" and inside:
        base = relative(affine.meta["call"].path, outer.path)
    elif site.nonlinearity.op == "call_module":
        base = relative(site.nonlinearity.meta["call"].path, outer.path)
    else:
        base = site.nonlinearity.name.rstrip("_0123456789")
    return base.replace(".", "_") + "_bn"
