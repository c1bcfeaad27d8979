"""A model as one trace, or as its largest traceable pieces where the whole cannot be followed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from batchnorm.surgery.graph import Trace, Untraceable, is_leaf, join
from batchnorm.surgery.models import copied, fixed_randomness
from batchnorm.surgery.outcome import Refusal
from batchnorm.surgery.tracer import trace


def traces(
    model: nn.Module, args: Sequence[Any], own: tuple[type, ...] = (), *, training: bool = True
) -> tuple[list[Trace], list[Refusal], set[str]]:
    """Follow a model's forward, whole or in pieces, and measure all shapes.

    A piece is taken only if, on the example, it is called once and nothing inside it is called
    from elsewhere: then what the piece shows is all that happens to its modules.

    Args:
        model: Not changed.
        args: Example, positional arguments.
        own: Classes of the user's that are one step.
        training: The mode in which it is followed.

    Returns:
        The traces, a refusal for each module whose own forward could not be followed, and the
        paths of all modules that are called.
    """
    try:
        whole = _measured(model, args, {}, "", own, training)
        return [whole], [], {call.path for call in whole.calls}
    except Untraceable as why:
        found: list[Trace] = []
        refusals = [Refusal("", _cannot(why))]
        records = _record(model, args)
        _descend("", model, records, own, training, found, refusals)
        return found, refusals, set(records)


def _measured(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    prefix: str,
    own: tuple[type, ...],
    training: bool,
) -> Trace:
    traced, inputs = trace(module, args, kwargs, training=training, prefix=prefix, own=own)
    try:
        traced.measure(inputs)
    except Exception as error:  # followed in training mode, a forward may still fail in evaluation
        raise Untraceable(
            f"its graph does not run on the example ({type(error).__name__}: {error})"
        ) from error
    return traced


def _cannot(why: Untraceable) -> str:
    return f"its forward cannot be traced ({why}); what it calls itself is left alone"


@dataclass
class _Record:
    """The calls of one module while the example runs."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    around: list[frozenset[str]] = field(default_factory=list)


def _record(model: nn.Module, args: Sequence[Any]) -> dict[str, _Record]:
    """Arguments and surroundings of every call, by path."""
    watched = copied(model).eval()
    records: dict[str, _Record] = {}
    running: list[str] = []

    def enter(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            record = records.setdefault(path, _Record(args, kwargs))
            record.around.append(frozenset(running))
            running.append(path)

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    for path, module in watched.named_modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        module.register_forward_pre_hook(enter(path), with_kwargs=True)
        module.register_forward_hook(leave)
    with torch.no_grad(), fixed_randomness(watched):
        watched(*args)
    return records


def _descend(
    path: str,
    module: nn.Module,
    records: dict[str, _Record],
    own: tuple[type, ...],
    training: bool,
    found: list[Trace],
    refusals: list[Refusal],
) -> None:
    for name, child in module.named_children():
        inside = join(path, name)
        record = records.get(inside)
        if is_leaf(child, own) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
            continue
        if record is not None:
            if len(record.around) > 1:
                refusals.append(
                    Refusal(
                        inside,
                        f"called {len(record.around)} times by a forward that cannot be traced: its calls "
                        f"differ in their statistics and cannot be told apart",
                    )
                )
                continue
            if _is_closed(inside, child, records):
                try:
                    found.append(_measured(child, record.args, record.kwargs, inside, own, training))
                    continue
                except Untraceable as why:
                    refusals.append(Refusal(inside, _cannot(why)))
        _descend(inside, child, records, own, training, found, refusals)


def _is_closed(path: str, module: nn.Module, records: dict[str, _Record]) -> bool:
    """Whether every call of what is inside happens within a call of the module."""
    inner = [f"{path}.{name}" for name, _ in module.named_modules() if name]
    return all(path in around for name in inner if name in records for around in records[name].around)
