"""One kind of normalization layer put for another, in a model that computes the same."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import distributed
from batchnorm.layers import Normalization
from batchnorm.layers.variation import Variation
from batchnorm.surgery import patterns
from batchnorm.surgery.agreement import Agreement, compare
from batchnorm.surgery.kind import Calls, Kind, is_normalization
from batchnorm.surgery.kind_variation import name_places
from batchnorm.surgery.kinds import kind_named
from batchnorm.surgery.models import as_args, check_example, check_model, copied, outputs
from batchnorm.surgery.outcome import Change, Note, Refusal
from batchnorm.surgery.splitting import rejoin, split, split_obstacle
from batchnorm.surgery.twin import TwinReport, check_agreement, parameters_by_original


def convert(
    model: nn.Module,
    to: str,
    example: Tensor | tuple[Any, ...] | None = None,
    *,
    only: patterns.Patterns = None,
    except_: patterns.Patterns = None,
    **options: Any,
) -> tuple[nn.Module, TwinReport]:
    """Change the kind of a model's normalization layers, and nothing that it computes.

    A layer changes its class in a copy of the model: parameters, statistics, hooks, flags, names and
    every other reference to it, as of layers that share it, stay. What cannot become the other kind
    without losing something it does is left as it is, with the reason.

    Args:
        model: Not changed; in either mode, which stays.
        to: "plain" for the layers of this package, also from ``SyncBatchNorm`` (the example shows
            of which dimension) and torchvision's ``FrozenBatchNorm2d`` (frozen); "torch" for those of
            `torch.nn`. An activation that a layer carries becomes a child of its own, in the plain
            ``nn.Sequential`` that holds the layer, and is carried again on the way back. "synced" for
            the layers of this package that normalize by the batch of several ranks, as one process
            with all of it would, also from ``SyncBatchNorm``; outside a process group they do what
            the plain ones do. "ghost", "renorm", "accumulated", "evalnorm" and "whitened" for those that
            normalize virtual batches (`batchnorm.layers.Ghost`), correct towards running statistics
            (`Renorm`), and so on; such a kind differs from the plain one in some mode by intent.
        example: An input tensor, or a tuple of positional arguments, on the model's device. With one,
            outputs, gradients and statistics of both models are compared on it, in both modes but for
            those in which the kinds differ by intent; there the new model has to run.
        only: Glob patterns; only layers whose path matches one are converted.
        except_: Glob patterns; layers whose path matches one are not.
        options: Of the kind. For "synced" ``group``, the process group whose ranks share a batch (all
            ranks when ``None``, or the group that a ``SyncBatchNorm`` has), or in its place
            ``group_size``: so many consecutive ranks share a batch, and all ranks have to call this, as
            the first call for a size makes the groups. For "ghost" ``ghost_size``, the examples in a
            virtual batch. For "accumulated" ``micro_batches`` in a window; for "evalnorm" the
            ``batch_size`` of training, or ``example_weight``; for "whitened" ``group_channels`` and
            ``iterations``; for "renorm" ``r_max`` and ``d_max``, numbers or functions of the step.

    Returns:
        The new model and the report: every change, everything left alone with its reason, the
        comparison, and `TwinReport.repoint` for an optimizer to go on with the new model.

    Raises:
        TypeError: ``model`` or ``example`` has the wrong type.
        ValueError: No such kind; an option that it has not, lacks, or that makes no sense; no batch
            normalization; a pattern matches none; the model is lazy, scripted or wrapped, cannot be
            copied, or fails on the example.
        RuntimeError: The result would compute something else than the model; nothing is returned.
    """
    check_model(model, "convert")
    kind = kind_named(to, options)
    args = None if example is None else as_args(example)
    layers = {path: m for path, m in model.named_modules() if is_normalization(m)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no batch normalization to convert")
    only, except_ = patterns.as_list(only), patterns.as_list(except_)
    patterns.check([*only, *except_], layers, "batch normalization")
    # What one rank tries out on its example is no other rank's business.
    with distributed.alone():
        return _converted(model, kind, args, layers, only, except_)


def _converted(
    model: nn.Module,
    kind: Kind,
    args: tuple[Any, ...] | None,
    layers: dict[str, nn.Module],
    only: Sequence[str],
    except_: Sequence[str],
) -> tuple[nn.Module, TwinReport]:
    if args is not None:
        check_example(model, args)
    calls = {} if args is None else _calls(model, args, layers)
    new = copied(model)
    changes: list[Change] = []
    refusals: list[Refusal] = []
    intended: list[tuple[str, Mapping[str, str]]] = []
    for path in layers:
        layer, called = new.get_submodule(path), calls.get(path, Calls())
        reason = patterns.excluded({path}, only, except_)
        if not reason and kind.is_one(layer):
            continue
        reason = reason or kind.obstacle(layer, called)
        splits = isinstance(layer, Normalization) and bool(layer.activation) and not kind.carries_activations
        if not reason and splits:
            reason = split_obstacle(new, layer)
        if reason:
            refusals.append(Refusal(path, reason))
            continue
        intended.append((path, _differs(layer)))
        remark = split(new, layer) if splits else ""
        what = kind.become(layer, called)
        if kind.carries_activations:
            remark = rejoin(new, layer)
        intended.append((path, _differs(layer)))
        changes.append(Change(path, what + remark))
    name_places(new)
    return new, _report(model, new, args, changes, refusals, intended)


def _differs(layer: nn.Module) -> Mapping[str, str]:
    return layer.differs if isinstance(layer, Variation) else {}


def _report(
    model: nn.Module,
    new: nn.Module,
    args: tuple[Any, ...] | None,
    changes: list[Change],
    refusals: list[Refusal],
    intended: Sequence[tuple[str, Mapping[str, str]]],
) -> TwinReport:
    agreement: list[Agreement] = []
    notes: list[Note] = []
    reasons = list(dict.fromkeys(pair for _, differs in intended for pair in differs.items()))
    for mode, what in reasons:
        num = len({path for path, differs in intended if differs.get(mode) == what})
        layers = "1 layer differs" if num == 1 else f"{num} layers differ"
        notes.append(Note("", f"{layers} in {mode} by intent: {what}"))
    if args is not None and changes:
        agreement, remarks = compare(model, new, args, but_not_in={mode for mode, _ in reasons})
        notes += [Note("", remark) for remark in remarks]
        check_agreement(agreement, "converted", "except it with except_=, and please report the model")
    elif changes:
        notes.append(Note("", "not compared with the original: no example was given"))
    return TwinReport(
        tuple(changes),
        tuple(refusals),
        tuple(notes),
        max((a.outputs for a in agreement), default=None),
        agreement=tuple(agreement),
        parameters=parameters_by_original(model, new),
    )


def _calls(model: nn.Module, args: Sequence[Any], layers: dict[str, nn.Module]) -> dict[str, Calls]:
    """How the example calls each layer, in both modes."""
    seen: dict[str, Calls] = {}
    for training in (False, True):
        watched = copied(model).train(training)
        for path in layers:

            def hook(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                before = seen.get(path, Calls())
                given = [v for v in (*args, *kwargs.values()) if v is not None]
                dims = before.dims | {given[0].dim()}
                seen[path] = Calls(dims, before.has_extras or len(given) > 1)

            watched.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                outputs(watched, args)
        except Exception:  # in training the user's forward may want something else, or another device
            if not training:
                raise
    return seen
