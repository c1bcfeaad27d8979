"""Batch normalization, sum and activation as one layer, in a model that computes the same as before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.distributed import alone
from batchnorm.kernels import keep_freed_memory
from batchnorm.layers import Normalization, adopt
from batchnorm.surgery.agreement import Agreement, compare
from batchnorm.surgery.fusible import Evaluation, Finding, Fusion, fusions_of
from batchnorm.surgery.fusing import fuse_all
from batchnorm.surgery.layout import Layout, choose
from batchnorm.surgery.models import as_args, check_example, check_model, copied
from batchnorm.surgery.outcome import Change, Note, Refusal
from batchnorm.surgery.pieces import traces
from batchnorm.surgery.saving import bytes_for_backward, forget_outputs
from batchnorm.surgery.twin import TwinReport, check_agreement, parameters_by_original

_TORCHS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class AccelerateReport(TwinReport):
    """What was swapped and fused, and how closely the two models agree.

    Attributes:
        layout: The memory format that was chosen, and why.
        keeps_memory: Whether this process keeps the memory of freed tensors for new ones.
        bytes_before: Held for backward by the original on the example, in training; parameters,
            buffers and the example not counted. ``None`` without ``save_memory`` or example.
        bytes_after: Likewise by the new model.
    """

    layout: Layout | None = None
    keeps_memory: bool = False
    bytes_before: int | None = None
    bytes_after: int | None = None

    def __str__(self) -> str:
        parts = [super().__str__()]
        if self.layout is not None:
            parts.append(_layout_line(self.layout))
        if self.keeps_memory:
            parts.append("memory of freed tensors: kept for new ones, in this whole process")
        if self.bytes_before is not None and self.bytes_after is not None:
            share = f" ({self.bytes_after / self.bytes_before:.0%})" if self.bytes_before else ""
            parts.append(
                f"held for backward: {self.bytes_before:,} bytes before, {self.bytes_after:,} after{share}"
            )
        return "\n".join(part for part in parts if part)


@alone()  # what is tried out here is no other rank's business
def accelerate(
    model: nn.Module,
    example: Tensor | tuple[Any, ...] | None = None,
    *,
    save_memory: bool = False,
    channels_last: bool | None = None,
    keep_memory: bool = True,
) -> tuple[nn.Module, AccelerateReport]:
    """Let a model run on our layers, with activations and residual sums fused into them.

    Every `torch.nn.BatchNorm1d`, ``2d`` and ``3d`` becomes our layer of the same kind. Where the
    trace of the model, in training and in evaluation, proves that a normalization's output goes
    to nothing but an activation of `batchnorm.functional.ACTIVATIONS`, with torch's default
    settings, or to a sum with a tensor of the same shape and from there to such an activation,
    one layer does it all. What the two models compute is compared on the example in both modes.

    State dicts are interchangeable with the original's, strictly and both ways. The user's
    classes stay; an activation that a layer carries leaves an ``nn.Identity`` in its place.

    Args:
        model: Not changed; in either mode, which stays.
        example: An input tensor, or a tuple of positional arguments, on the model's device, of
            the shape that matters for speed. Without one, or for a model that cannot be traced,
            layers are swapped and nothing is fused.
        save_memory: Forget outputs of the layers between forward and backward, and compute them
            again from the layers' inputs when the backward pass wants them. Running statistics
            move once. Under `torch.compile` the compiler decides what is kept.
        channels_last: Whether to convert a model whose convolutions are all 2-d to channels-last;
            ``None`` times a training step on the example both ways and takes the faster.
        keep_memory: Whether to call `batchnorm.kernels.keep_freed_memory` for a model on the CPU:
            the process then keeps freed memory, and training meets no fresh pages.

    Returns:
        The new model and the report: every swap and fusion, everything left alone with its
        reason, the comparison, and what an optimizer needs to go on with the new model.

    Raises:
        TypeError: ``model`` or ``example`` has the wrong type.
        ValueError: The model cannot be copied, fails or is not finite on the example.
        RuntimeError: The result would compute something else than the model; nothing is returned.
    """
    check_model(model, "accelerate")
    on_cpu = all(p.is_cpu for p in model.parameters())
    unkept = keep_freed_memory() if keep_memory and on_cpu else "not asked for, or not on the CPU"
    args = None if example is None else as_args(example)
    if args is not None:
        check_example(model, args)
    norms = {path: m for path, m in model.named_modules() if isinstance(m, _BatchNorm)}
    refusals = [Refusal(path, _foreign(m)) for path, m in norms.items() if _foreign(m)]
    norms = {path: m for path, m in norms.items() if not _foreign(m)}
    findings, evaluation, left = _findings(model, args, norms)
    refusals += left

    new = copied(model)
    for path in norms:
        adopt(new.get_submodule(path))
    wanted = [f for found in findings.values() for f in found if isinstance(f, Fusion)]
    undone, remarks = fuse_all(new, wanted, evaluation)
    findings = {
        path: [undone.get(f, f) if isinstance(f, Fusion) else f for f in found]
        for path, found in findings.items()
    }
    changes = [
        Change(path, what) for path, m in norms.items() if (what := _change(m, findings.get(path, [])))
    ]
    refusals += [
        Refusal(path, f"not fused: {finding}")
        for path, found in findings.items()
        for finding in dict.fromkeys(found)
        if isinstance(finding, str) and finding
    ]
    notes = [Note(path, remark) for path, remark in remarks.items()]
    if keep_memory and on_cpu and unkept:
        notes.append(Note("", f"memory of freed tensors is not kept: {unkept}"))
    if save_memory:
        forget_outputs(new)
    agreement: list[Agreement] = []
    if args is not None:
        agreement, not_compared = compare(model, new, args)
        notes += [Note("", remark) for remark in not_compared]
        advice = "accelerate it without an example, which fuses nothing, and please report the model"
        check_agreement(agreement, "accelerated", advice)
    layout = choose(new, args, channels_last)
    counted: dict[str, int] = {}
    if save_memory and args is not None:
        counted = {
            "bytes_before": bytes_for_backward(model, args, forget=False),
            "bytes_after": bytes_for_backward(new, args, forget=True),
        }
    return new, AccelerateReport(
        tuple(changes),
        tuple(refusals),
        tuple(notes),
        max((a.outputs for a in agreement), default=None),
        agreement=tuple(agreement),
        layout=layout,
        keeps_memory=not unkept,
        parameters=parameters_by_original(model, new),
        **counted,
    )


def _foreign(norm: nn.Module) -> str:
    """Why a normalization cannot become ours; empty if it can, or is."""
    if isinstance(norm, Normalization) or type(norm) in _TORCHS:
        return ""
    name = type(norm).__name__
    return (
        f"{name} is neither torch's BatchNorm1d, 2d or 3d itself nor ours, so what it does is not known here"
    )


def _findings(
    model: nn.Module, args: tuple[Any, ...] | None, norms: Mapping[str, nn.Module]
) -> tuple[dict[str, list[Finding]], Evaluation, list[Refusal]]:
    nothing: dict[str, list[Finding]] = {}
    if args is None or not norms:
        reason = "nothing is fused without an example, on which to prove what feeds what"
        left = [Refusal("", reason)] if norms else []
        return nothing, Evaluation((), ()), left
    found, left, called = traces(model, args)
    in_evaluation, _, called_there = traces(model, args, training=False)
    evaluation = Evaluation(in_evaluation, called_there)
    findings = fusions_of(model, found, evaluation, list(norms))
    for path in norms:
        if path not in findings:
            seen = (
                "a forward that cannot be traced calls it"
                if path in called
                else "the example does not reach it"
            )
            findings[path] = [seen]
    return findings, evaluation, left


def _change(norm: nn.Module, findings: list[Finding]) -> str:
    ours = isinstance(norm, Normalization)
    parts = [] if ours else [f"now batchnorm.{type(norm).__name__}"]
    parts += dict.fromkeys(str(f) for f in findings if isinstance(f, Fusion))
    return "; ".join(parts)


def _layout_line(layout: Layout) -> str:
    name = "channels-last" if layout.channels_last else "as it was"
    times = ""
    if layout.contiguous_s is not None and layout.channels_last_s is not None:
        before, after = (f"{s * 1e3:.1f} ms" for s in (layout.contiguous_s, layout.channels_last_s))
        times = f" ({before} as it was, {after} channels-last)"
    return f"memory format: {name}: {layout.reason}{times}"
