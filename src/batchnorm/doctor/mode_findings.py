"""Layers in the wrong mode: left in training, frozen and yet moving, updated twice a step."""

from typing import Any

import torch
from torch import nn

from batchnorm.doctor.data import halves
from batchnorm.doctor.diagnosis import Effect, Finding
from batchnorm.doctor.examination import Examination, distance
from batchnorm.doctor.observe import AS_IT_IS, is_frozen, norms_of
from batchnorm.doctor.step import Step, take_step
from batchnorm.layers import adopt
from batchnorm.surgery import freeze
from batchnorm.surgery.models import copied

# Of a deviation, in one step: rounding moves less.
MOVES = 1e-9


def find(exam: Examination) -> list[Finding]:
    """All findings about modes."""
    return [*_in_training(exam), *_moving(exam), *_twice(exam)]


def _in_training(exam: Examination) -> list[Finding]:
    without = [
        n for n, m in exam.layers.items() if m.running_mean is None and not m.training and n in exam.seen
    ]
    active = [n for n, m in exam.layers.items() if m.training and not is_frozen(m) and n in exam.seen]
    if not active and not without:
        return []
    cured: nn.Module = exam.model
    before, after = _by_company(exam, cured, AS_IT_IS), None
    if not without:
        after = _by_company(exam, cured, "inference")
    effect = None
    if before is not None and after is not None:
        effect = Effect("change of an output by the others in its batch, in deviations", before, after)
    names = tuple(active or without)
    if active and exam.model.training:
        level, what = (
            "risk",
            "the model is in training mode: if this is how it predicts, call model.eval() first",
        )
    elif active:
        level, what = "wrong", "the model is in evaluation mode and these layers are not"
    else:
        level, what = "wrong", "these layers keep no running statistics (track_running_stats=False)"
    return [
        Finding(
            "training-mode" if active else "no-running-statistics",
            level,
            names,
            f"{what}; predictions depend on what else is in the batch"
            + (f", by {before:.2g} deviations between whole and half batches" if before is not None else ""),
            {} if before is None else {"by_company": before},
            "model.eval(), with no train() of a submodule overridden"
            if active
            else "track_running_stats=True, then bn.recalibrate(model, batches)",
            effect,
        )
    ]


def _by_company(exam: Examination, model: nn.Module, mode: str) -> float | None:
    """How far outputs move when the batches are cut in halves."""
    cut = [half for batch in exam.data for half in halves(batch)]
    if not exam.is_mixed or len(cut) != 2 * len(exam.data):
        return None
    whole, parts = exam.observe(model, exam.data, mode), exam.observe(model, cut, mode)
    joined = [
        [torch.cat([first, second]) for first, second in zip(*pair, strict=True)]
        for pair in zip(parts.outputs[::2], parts.outputs[1::2], strict=True)
    ]
    return distance(joined, whole.outputs)


def _moving(exam: Examination) -> list[Finding]:
    if exam.step is None:
        return []
    learns = any(p.requires_grad for p in exam.model.parameters())
    moving = {}
    for name, layer in exam.layers.items():
        own = list(layer.parameters(recurse=False))
        stopped = bool(own) and learns and not any(p.requires_grad for p in own)
        if (stopped or name in exam.resting) and exam.step.moved.get(name, 0.0) > MOVES:
            moving[name] = exam.step.moved[name]
    if not moving:
        return []
    names = tuple(sorted(moving, key=lambda name: -moving[name]))
    frozen = copied(exam.model)
    freeze(frozen, only=[name for name in names if name])
    after = _step(exam, frozen)
    return [
        Finding(
            "frozen-layer-moves",
            "risk",
            names,
            "γ and β are stopped, or the layer was put into evaluation mode by hand, as one freezes a "
            "layer; yet after "
            f"model.train() it normalizes by the batch and its statistics move ({moving[names[0]]:.2g} "
            "deviations a step)",
            {"moved": moving[names[0]]},
            "bn.freeze(model, only=[…]), which survives train() and is saved",
            None
            if after is None
            else Effect("move of the statistics a step", moving[names[0]], after.moved[names[0]]),
        )
    ]


def _twice(exam: Examination) -> list[Finding]:
    if exam.step is None:
        return []
    again = {name: count for name, count in exam.step.counted_again.items() if count}
    if not again:
        return []
    names = tuple(again)
    ours = copied(exam.model)
    for layer in norms_of(ours).values():
        if type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            adopt(layer)
    after = _step(exam, ours)
    momentum = exam.layers[names[0]].momentum
    total = exam.step.counted[names[0]] + again[names[0]]
    effective = (
        "" if momentum is None else f"; momentum {momentum:g} acts as {1 - (1 - momentum) ** total:.2g}"
    )
    return [
        Finding(
            "double-update",
            "risk",
            names,
            f"{total} updates of the statistics in one step, {again[names[0]]} of them in the backward "
            "pass: activation "
            f"checkpointing runs the layer again{effective}",
            {"updates": float(total)},
            "our layers (bn.accelerate, or bn.convert(model, to='plain')), which know a recomputation",
            None
            if after is None
            else Effect("updates in the backward pass", again[names[0]], after.counted_again[names[0]]),
        )
    ]


def _step(exam: Examination, model: nn.Module) -> Step | None:
    batch: Any = exam.data[0]
    try:
        return take_step(model, batch, exam.forward)
    except Exception:  # it went through before; the cure does not suit the user's model
        return None
