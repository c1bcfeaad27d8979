"""Inputs and parameters of layers: large means, tiny variances, dead channels and biases, decay."""

import math

import torch
from torch import Tensor, nn

from batchnorm.doctor.diagnosis import Effect, Finding
from batchnorm.doctor.examination import Examination, distance
from batchnorm.doctor.observe import Seen
from batchnorm.moments import Moments
from batchnorm.surgery.models import copied

# Rounding of the inputs, in deviations, that is worth a word: float32 with |mean| at 1,700 deviations.
ROUNDED = 1e-4
# In half precision every activation is rounded by this many roundoffs anyway.
USUAL_ROUNDOFFS = 12
DEAD_SHARE = 0.1
STILL = 1e-3


def find(exam: Examination) -> list[Finding]:
    """All findings about inputs and parameters of layers."""
    return [*_large_mean(exam), *_tiny_variance(exam), *_dead(exam), *_biases(exam), *_decay(exam)]


def _rounding(seen: Seen) -> float:
    """Rounding error of the inputs in their own deviations: nine channels in ten have less."""
    moments, roundoff = seen.moments, torch.finfo(seen.dtype).eps / 2
    varies = ~_constant(moments)
    if not varies.any():
        return 0.0
    ratio = (moments.mean.abs() / moments.var.sqrt())[varies]
    return float(ratio.quantile(0.9)) * roundoff


def _constant(moments: Moments) -> Tensor:
    return moments.var <= 1e-13 * moments.mean.square()


def _large_mean(exam: Examination) -> list[Finding]:
    noise = {}
    for name, seen in exam.seen.items():
        roundoff = torch.finfo(seen.dtype).eps / 2
        if (value := _rounding(seen)) > max(ROUNDED, USUAL_ROUNDOFFS * roundoff):
            noise[name] = value / roundoff
    if not noise:
        return []
    names = tuple(sorted(noise, key=lambda name: -noise[name]))
    before, after = _rounding(exam.seen[names[0]]), None
    producer = exam.step.producers.get(names[0]) if exam.step is not None else None
    bias = getattr(exam.model.get_submodule(producer), "bias", None) if producer else None
    advice = "keep the mean out of what the layer receives: centre the inputs of the model or of that layer"
    if producer and isinstance(bias, Tensor):
        advice = (
            f"subtract the mean from the bias of {producer!r} and from running_mean, which changes no output"
        )
        after = _rounding(exam.observe(_centred(exam, names[0], producer), exam.data, "batch").seen[names[0]])
    return [
        Finding(
            "large-mean",
            "risk",
            names,
            f"means of {noise[names[0]]:.3g} deviations: rounding in {str(exam.seen[names[0]].dtype)[6:]} is "
            f"{before:.1e} deviations before the layer even begins",
            {"ratio": noise[names[0]], "rounding": before},
            advice,
            None if after is None else Effect("rounding in deviations", before, after),
        )
    ]


def _centred(exam: Examination, name: str, producer: str) -> nn.Module:
    model = copied(exam.model)
    layer, mean = model.get_submodule(name), exam.seen[name].moments.mean
    with torch.no_grad():
        bias = model.get_submodule(producer).bias
        bias.sub_(mean.view_as(bias))
        if layer.running_mean is not None:
            layer.running_mean.sub_(mean.view_as(layer.running_mean))
    return model


def _tiny_variance(exam: Examination) -> list[Finding]:
    shrunk = {}
    for name, seen in exam.seen.items():
        moments, eps = seen.moments, exam.layers[name].eps
        varies = ~_constant(moments) & (moments.var > 0)
        if varies.any():
            kept = (moments.var / (moments.var + eps)).sqrt()[varies].median()
            if kept < math.sqrt(0.5):
                shrunk[name] = float(kept)
    if not shrunk:
        return []
    names = tuple(sorted(shrunk, key=lambda name: shrunk[name]))
    layer, var = exam.layers[names[0]], float(exam.seen[names[0]].moments.var.median())
    advised = float(f"{max(var / 1000, torch.finfo(torch.float32).tiny):.0e}")
    after = math.sqrt(var / (var + advised))
    return [
        Finding(
            "small-variance",
            "risk",
            names,
            f"variances of {var:.1e} (median) under eps={layer.eps:g}: normalized values have a deviation of "
            f"{shrunk[names[0]]:.2g} instead of 1, and the layer is little more than a shift",
            {"variance": var, "deviation": shrunk[names[0]]},
            f"eps={advised:g}, or inputs and weights of a larger scale before it",
            Effect("deviation short of 1", 1 - shrunk[names[0]], 1 - after),
        )
    ]


def _dead(exam: Examination) -> list[Finding]:
    dead: dict[str, Tensor] = {}
    why: dict[str, tuple[int, int]] = {}
    for name, seen in exam.seen.items():
        layer = exam.layers[name]
        constant = _constant(seen.moments)
        silent = torch.zeros_like(constant)
        if layer.weight is not None:
            gamma = layer.weight.detach().double().abs().flatten()
            silent = gamma <= STILL * gamma.median()
        if (constant | silent).double().mean() >= DEAD_SHARE:
            dead[name] = constant | silent
            why[name] = int(constant.sum()), int((silent & ~constant).sum())
    if not dead:
        return []
    names = tuple(sorted(dead, key=lambda name: -float(dead[name].double().mean())))
    without = copied(exam.model)
    with torch.no_grad():
        for name, channels in dead.items():
            weight = without.get_submodule(name).weight
            if weight is not None:
                weight[channels.view_as(weight)] = 0
    outputs = exam.observe(without, exam.data, "inference").outputs
    change = distance(outputs, exam.inference.outputs)
    num_constant, num_silent = why[names[0]]
    channels = dead[names[0]]
    first = ", ".join(str(int(i)) for i in channels.nonzero().flatten()[:8])
    return [
        Finding(
            "dead-channels",
            "note",
            names,
            f"{int(channels.sum())} of {len(channels)} channels "
            f"({first}{', …' if channels.sum() > 8 else ''}) say nothing: "
            f"{num_constant} with a constant input, {num_silent} with γ at zero; with γ = 0 in all "
            f"of them the outputs change by {change:.1e} deviations",
            {
                "dead": float(channels.sum()),
                "constant": num_constant,
                "silent": num_silent,
                "outputs_change": change,
            },
            "remove them, or train again with a smaller rate or another initialization if the width is "
            "needed",
        )
    ]


def _biases(exam: Examination) -> list[Finding]:
    if exam.step is None or not exam.step.dead_biases:
        return []
    dead = exam.step.dead_biases
    behind = {producer: name for name, producer in exam.step.producers.items()}
    biases: list[Tensor] = [exam.model.get_submodule(name).bias for name in dead]  # type: ignore[misc]
    size = sum(bias.numel() for bias in biases)
    first = next(iter(dead))
    reader = f" ({behind[first]!r} takes its mean off again)" if first in behind else ""
    return [
        Finding(
            "dead-bias",
            "note",
            tuple(dead),
            f"{len(dead)} with a bias whose gradient is zero to {max(dead.values()):.0e} of the weight's, "
            "for a "
            f"normalization follows{reader}: {size:,} parameters that cannot learn. Adam moves them all the "
            "same, "
            "by rounding noise",
            {"biases": size},
            "bias=False there; bn.insert removes them in models that it normalizes",
        )
    ]


def _decay(exam: Examination) -> list[Finding]:
    decayed: dict[str, float] = exam.decayed
    if not decayed:
        return []
    names = tuple(sorted(decayed, key=lambda name: -decayed[name]))
    return [
        Finding(
            "decay-on-scale",
            "note",
            names,
            f"the optimizer decays γ or β of {len(decayed)} normalizations; by itself that takes "
            f"{decayed[names[0]]:.1%} of "
            "them away in 10,000 steps, though they have no scale that decay could regularize",
            {"lost_in_10000": decayed[names[0]]},
            "optimizer = SGD(bn.parameter_groups(model, weight_decay), …)",
            Effect("share lost to decay in 10,000 steps", decayed[names[0]], 0.0),
        )
    ]


def decayed_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """Normalizations whose γ or β the optimizer decays, and the share that decay takes in 10,000 steps."""
    if optimizer is None:
        return {}
    lost = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            lost[id(parameter)] = 1 - (1 - min(1.0, group["lr"] * group.get("weight_decay", 0.0))) ** 10_000
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            worst = max((lost.get(id(p), 0.0) for p in module.parameters(recurse=False)), default=0.0)
            if worst > 0:
                found[name] = worst
    return found
