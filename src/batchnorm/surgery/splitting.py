"""Activations that layers carry, as modules of their own again; and carried again."""

from collections.abc import Iterator

from torch import nn

from batchnorm.layers import Normalization
from batchnorm.surgery.nonlinearities import kind_of_module, module_of

_MARK = "_split_from_normalization"


def split_obstacle(model: nn.Module, layer: Normalization) -> str:
    """Why the activation that a layer carries cannot become a module behind it; empty if it can.

    It can where the layer is a child of plain ``nn.Sequential``\\ s alone: there a new child behind it
    renames nothing in the state dict.
    """
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks, which would see values before the activation instead of behind it"
    for parent, name in _places(model, layer):
        if not _is_sequential(parent):
            owner = type(parent).__name__
            return (
                f"it carries {layer.activation}, which torch.nn's layers do not, and stands in a {owner}, "
                f"not in a plain nn.Sequential: together with an activation module it would have another "
                f"name in the state dict. Apply it in {owner}'s forward, and make {name!r} without"
            )
    if layer is model:
        return (
            f"it carries {layer.activation}, which torch.nn's layers do not, and is the whole model: put it "
            f"into an nn.Sequential"
        )
    return ""


def split(model: nn.Module, layer: Normalization) -> str:
    """Put the activation that a layer carries behind it, in every ``nn.Sequential`` that holds it.

    In the place of an ``nn.Identity`` that `accelerate` left there, or as a new child.

    Args:
        model: Changed in place.
        layer: Of the model, without a `split_obstacle`.

    Returns:
        What happened.
    """
    activation = str(layer.activation)
    layer.activation = None
    remark = ""
    for parent, name in list(_places(model, layer)):
        children = list(parent._modules.items())
        position = [n for n, _ in children].index(name)
        act = module_of(activation)
        act.train(layer.training)
        following = children[position + 1] if position + 1 < len(children) else ("", None)
        if type(following[1]) is nn.Identity and not following[1]._forward_hooks:
            act.__dict__[_MARK] = "in place of an identity"
            parent._modules[following[0]] = act
            remark = f"; {activation} in the nn.Identity's place"
            continue
        act.__dict__[_MARK] = "a new child"
        new = next(n for n in _names(f"{name}_{activation}") if n not in parent._modules)
        children.insert(position + 1, (new, act))
        parent._modules.clear()
        parent._modules.update(children)
        remark = f"; {activation} is a new child behind it, {new}, and those after it move on"
    return remark


def rejoin(model: nn.Module, layer: Normalization) -> str:
    """Undo `split`: a layer carries the activation again that was put behind it.

    Args:
        model: Changed in place.
        layer: Of the model.

    Returns:
        What happened; empty where nothing was split off.
    """
    places = list(_places(model, layer))
    behind = [_following(parent, name) for parent, name in places]
    kinds = {kind_of_module(act) for _, act in behind if act is not None and _MARK in act.__dict__}
    if len(kinds) != 1 or any(act is None or _MARK not in act.__dict__ for _, act in behind):
        return ""
    if any(act._forward_hooks or act._forward_pre_hooks for _, act in behind if act is not None):
        return ""
    layer.activation = kinds.pop()
    for (parent, _), (name, act) in zip(places, behind, strict=True):
        assert act is not None
        if act.__dict__[_MARK] == "a new child":
            del parent._modules[name]
        else:
            identity = parent._modules[name] = nn.Identity()
            identity.train(act.training)
    return f"; carries {layer.activation} again"


def _places(model: nn.Module, layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is layer:
                yield parent, name


def _is_sequential(module: nn.Module) -> bool:
    is_plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return is_plain and "forward" not in vars(module)


def _following(parent: nn.Module, name: str) -> tuple[str, nn.Module | None]:
    children = list(parent._modules.items())
    position = [n for n, _ in children].index(name) + 1
    return children[position] if _is_sequential(parent) and position < len(children) else ("", None)


def _names(base: str) -> Iterator[str]:
    yield base
    number = 2
    while True:
        yield f"{base}_{number}"
        number += 1
