"""Statistics that several uses of a layer, or several ranks, do not share as they should."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batchnorm.doctor.causes import SIGNED_MISFIT, unlike_calls
from batchnorm.doctor.diagnosis import Effect, Finding
from batchnorm.doctor.examination import Examination
from batchnorm.doctor.observe import norms_of
from batchnorm.statistics import recalibrate
from batchnorm.statistics.choose import store
from batchnorm.surgery.models import copied


def find(exam: Examination) -> list[Finding]:
    """All findings about uses and ranks."""
    return [*_unlike_uses(exam), *_ranks(exam)]


def _unlike_uses(exam: Examination) -> list[Finding]:
    apart = unlike_calls(exam)
    if not apart:
        return []
    names = tuple(sorted(apart, key=lambda name: -apart[name]))
    after = exam.gap_after(lambda model: _separated(exam, model, names))
    seen = exam.seen[names[0]]
    return [
        Finding(
            "shared-layer",
            "wrong",
            names,
            f"called {len(seen.calls)} times in a forward pass, with inputs up to {apart[names[0]]:.2g} "
            "deviations from "
            "what they are together: training normalizes each call by itself, inference all of them by one "
            "average",
            {"apart": apart[names[0]], "calls": len(seen.calls)},
            "a normalization of its own for each use (γ and β may stay shared)",
            Effect(exam.gap.what, exam.gap.value, after.value),
        )
    ]


def _separated(exam: Examination, model: nn.Module, names: tuple[str, ...]) -> None:
    """Give each call of these layers the statistics of that call, as separate layers would have."""
    exam.recalibrate(model)
    calls = dict.fromkeys(names, 0)
    model.register_forward_pre_hook(lambda *_: calls.update(dict.fromkeys(names, 0)))
    for name in names:

        def enter(layer: Any, _: object, name: str = name) -> None:
            own = exam.seen[name].calls
            moments = own[min(calls[name], len(own) - 1)]
            calls[name] += 1
            if not layer.training:
                store(layer, *moments.estimates())

        model.get_submodule(name).register_forward_pre_hook(enter)


def _ranks(exam: Examination) -> list[Finding]:
    if exam.group is None:
        return []
    apart = _apart(exam, exam.model)
    names = tuple(sorted((n for n, off in apart.items() if off > SIGNED_MISFIT), key=lambda n: -apart[n]))
    if not names:
        return []
    cured = copied(exam.model)
    recalibrate(cured, exam.data, forward=exam.forward, group=exam.group, method="pooled")
    return [
        Finding(
            "ranks-disagree",
            "wrong",
            names,
            f"running statistics differ between ranks by up to {apart[names[0]]:.2g} deviations: each rank "
            "has seen its "
            "own data only, and evaluating or saving one of them takes its view for the whole",
            {"apart": apart[names[0]], "ranks": dist.get_world_size(exam.group)},
            "bn.recalibrate(model, batches, group=group) before evaluating and saving, which pools by count",
            Effect("distance between ranks", apart[names[0]], _apart(exam, cured)[names[0]]),
        )
    ]


def _apart(exam: Examination, model: nn.Module) -> dict[str, float]:
    """Largest distance, over ranks, of a layer's statistics from those of rank 0."""
    found = {}
    for name, layer in norms_of(model).items():
        if layer.running_mean is None:
            continue
        mine = torch.stack([layer.running_mean.double().flatten(), layer.running_var.double().flatten()])
        all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(exam.group))]
        dist.all_gather(all_ranks, mine, group=exam.group)
        std = (all_ranks[0][1] + layer.eps).clamp(min=1e-300).sqrt()
        found[name] = max(
            max(
                float(((other[0] - all_ranks[0][0]) / std).square().mean().sqrt()),
                float(((other[1] + layer.eps).clamp(min=1e-300).sqrt() / std).log().square().mean().sqrt()),
            )
            for other in all_ranks
        )
    return found
