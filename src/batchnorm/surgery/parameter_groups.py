"""Weight decay where it belongs: on weights, not on γ, β and biases."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from batchnorm.surgery import patterns

_NORMALIZATIONS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, except_: patterns.Patterns = None
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: weights, which decay, and all that should not.

    Decaying the weights before a batch normalization changes their scale alone, which it takes out
    again, and with it the effective learning rate; decaying γ and β changes what the network
    computes. Not decayed are

    - all parameters of normalization layers: `torch.nn`'s (batch, instance, layer, group, RMS), ours
      and subclasses, whatever shape γ and β have there;
    - every parameter named ``bias``, and every parameter of fewer than two dimensions, in modules of
      any class: scales, temperatures, a PReLU's slopes, other libraries' norms;
    - what ``except_`` names.

    Everything else decays: weights of linear layers and convolutions, embeddings, and parameters of
    two or more dimensions that a module of the user's holds, such as position embeddings.

    Each parameter appears once, in the model's order, also if modules share it; one that does not
    decay in one of its places does not decay. Frozen parameters (``requires_grad`` off) are kept, as
    optimizers pass over a parameter without gradient and it may be thawed.

    Args:
        model: Not changed.
        weight_decay: Of the first group, as the optimizer counts it, not negative.
        except_: Glob patterns on names of parameters that should not decay either.

    Returns:
        ``[{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]``,
        for any optimizer of `torch.optim`; either list may be empty.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: It has no parameters, or lazy ones, whose shape is not known; ``weight_decay`` is
            negative; or a pattern matches no parameter.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"parameter_groups needs a torch.nn.Module, got {type(model).__name__}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be zero or more, got {weight_decay}")
    places = _places(model)
    names = [name for found in places.values() for name, _ in found]
    if not names:
        raise ValueError(f"{type(model).__name__} has no parameters to group")
    except_ = patterns.as_list(except_)
    patterns.check(except_, names, "parameter")
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter, found in places.items():
        if is_lazy(parameter):
            raise ValueError(
                f"{found[0][0]} has no shape yet: run the lazy model once on real data before this"
            )
        spared = parameter.dim() < 2 or any(_is_spared(name, owner) for name, owner in found)
        spared = spared or bool(patterns.excluded({name for name, _ in found}, [], except_))
        (others if spared else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _places(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module]]]:
    """Names and holders of every parameter, in the model's order."""
    places: dict[nn.Parameter, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(prefix=path, recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((name, module))
    return places


def _is_spared(name: str, owner: nn.Module) -> bool:
    return isinstance(owner, _NORMALIZATIONS) or name.rpartition(".")[2] == "bias"
