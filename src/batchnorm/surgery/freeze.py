"""Normalization layers held at their running statistics, whatever mode the model is in."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.layers import Normalization
from batchnorm.layers.adopt import OURS, borrow, release
from batchnorm.surgery import patterns
from batchnorm.surgery.outcome import Change, Refusal, SurgeryReport

_BEFORE = "_before_freeze"


def freeze(
    model: nn.Module,
    only: patterns.Patterns = None,
    except_: patterns.Patterns = None,
    *,
    affine: bool = False,
) -> SurgeryReport:
    """Let batch normalization use its running statistics, and never move them, also in training mode.

    Works in place, and lasts through ``model.train()``, copies and state dicts of the layers. A
    plain `torch.nn` layer first becomes ours in place: same object, parameters and state dict.

    Args:
        model: Changed in place.
        only: Glob patterns; only layers whose path matches one are frozen.
        except_: Glob patterns; layers whose path matches one are not.
        affine: Stop γ and β too (``requires_grad`` off).

    Returns:
        What was frozen, and each layer that was not with the reason.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A pattern matches no batch normalization.
    """
    _check(model, "freeze")
    layers = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    only, except_ = patterns.as_list(only), patterns.as_list(except_)
    patterns.check([*only, *except_], layers, "batch normalization")
    changes: list[Change] = []
    refusals: list[Refusal] = []
    for path, layer in layers.items():
        reason = patterns.excluded({path}, only, except_) or _obstacle(layer)
        if reason:
            refusals.append(Refusal(path, reason))
            continue
        changes.append(Change(path, _freeze_layer(layer, affine)))
    return SurgeryReport(tuple(changes), tuple(refusals))


def thaw(model: nn.Module) -> SurgeryReport:
    """Undo `freeze` in place: statistics move again in training, γ and β learn if they did before.

    Args:
        model: Changed in place.

    Returns:
        What was thawed.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check(model, "thaw")
    frozen = {path: m for path, m in model.named_modules() if isinstance(m, Normalization) and m.frozen}
    before: dict[nn.Parameter, bool] = {}
    for layer in frozen.values():
        shared = layer.affine_parameters()
        for name, learned in layer.__dict__.pop(_BEFORE, {}).items():
            # Of layers that share one, only the first frozen has seen it learn.
            before[shared[name]] = before.get(shared[name], False) or learned
    for parameter, learned in before.items():
        parameter.requires_grad_(learned)
    for layer in frozen.values():
        layer.frozen = False
        release(layer, "freeze")
    return SurgeryReport(tuple(Change(path, "thawed") for path in frozen))


def _check(model: nn.Module, task: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{task} needs a torch.nn.Module, got {type(model).__name__}")


def _obstacle(layer: nn.Module) -> str:
    if layer.running_mean is None or layer.running_var is None:
        return "it keeps no running statistics to be frozen at"
    if not isinstance(layer, Normalization) and type(layer) not in OURS:
        return f"{type(layer).__name__} is neither torch's BatchNorm nor ours; replace it first"
    return ""


def _freeze_layer(layer: nn.Module, affine: bool) -> str:
    ours = borrow(layer, "freeze")
    # A second freeze must not take what the first one left for the original.
    if not ours.frozen or _BEFORE not in ours.__dict__:
        ours.__dict__[_BEFORE] = {name: p.requires_grad for name, p in ours.affine_parameters().items()}
    ours.frozen = True
    stopped = [name for name, p in ours.affine_parameters().items() if affine and p.requires_grad]
    for name in stopped:
        ours.affine_parameters()[name].requires_grad_(False)
    return "frozen at its running statistics" + (f"; {' and '.join(stopped)} stopped too" if stopped else "")
