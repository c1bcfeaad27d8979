"""Inference with and without `batchnorm.fold`: eager and compiled, one image and many."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from batchnorm.bench.timing import in_turns
from batchnorm.bench.zoo import ZOO, Name
from batchnorm.surgery import accelerate, fold
from batchnorm.surgery.kind import is_normalization

EAGER, COMPILED = "eval()", "torch.compile of eval()"
CHANNELS_LAST = "eval(), channels-last"
FOLDED, COMPILED_FOLDED = "folded", "torch.compile of folded"
BOTH = "accelerated, then folded"
LIMIT = "without normalization"
"""The network with its normalizations taken out, which computes something else: no fold is faster."""

_LAST = {3: torch.channels_last, 4: torch.channels_last_3d}
"""By the dimensions of an example, the layout in which PyTorch's convolutions may be faster."""


def measure(
    *,
    network: Name = "cifar10",
    batches: Sequence[int] = (1, 32),
    rounds: int = 9,
    compiled: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time the forward of a network and of what `fold` makes of it.

    Args:
        network: One of `zoo.ZOO`.
        batches: Numbers of images.
        rounds: Samples of each form, in which all forms take turns.
        compiled: Whether `torch.compile` takes part, with and without `fold`.
        progress: Told what is going on.

    Returns:
        By batch, milliseconds of each form (median and quartiles) and the speed-up of the folded model over
        ``eval()``, eager and compiled, with the most that any fold could reach, and of the accelerated and
        folded model over ``eval()`` in its faster layout; the speed-ups' geometric means; the normalizations
        left and the largest relative difference of the outputs.
    """
    member = ZOO[network]
    plain = _with_statistics(member.make(), member.shape)
    example = torch.randn(2, *member.shape)
    folded, proof = fold(plain, example)
    both, _ = fold(accelerate(plain, example)[0], example)
    models: dict[str, Any] = {EAGER: plain, FOLDED: folded, BOTH: both, LIMIT: _without(plain)}
    if last := _LAST.get(len(member.shape)):
        models[CHANNELS_LAST] = copy.deepcopy(plain).to(memory_format=last)  # type: ignore[call-overload]
    if compiled:
        models[COMPILED] = torch.compile(copy.deepcopy(plain), dynamic=False)
        models[COMPILED_FOLDED] = torch.compile(copy.deepcopy(folded), dynamic=False)
    found: dict[str, Any] = {
        "network": member.title,
        "left": sum(is_normalization(m) for m in folded.modules()) + len(proof.alone),
        "folded": len(proof.folds),
        "difference": proof.check,
        "milliseconds": {},
        "speed_up": {},
    }
    with torch.inference_mode():
        for batch in batches:
            progress(f"batch {batch}")
            x = torch.randn(batch, *member.shape)
            forms = {
                name: _forward(model, x.to(memory_format=last) if last and name == CHANNELS_LAST else x)
                for name, model in models.items()
            }
            times = in_turns(forms, rounds=rounds)
            found["milliseconds"][f"batch {batch}"] = {
                name: [round(s * 1e3, 3) for s in (t.median_s, t.low_s, t.high_s)]
                for name, t in times.items()
            }
            ratios = {
                "eager": times[EAGER].median_s / times[FOLDED].median_s,
                "eager, at most": times[EAGER].median_s / times[LIMIT].median_s,
                "accelerated before, of the faster layout": min(
                    times[name].median_s for name in (EAGER, CHANNELS_LAST) if name in times
                )
                / times[BOTH].median_s,
            }
            if compiled:
                ratios["compiled"] = times[COMPILED].median_s / times[COMPILED_FOLDED].median_s
            found["speed_up"][f"batch {batch}"] = {name: round(r, 3) for name, r in ratios.items()}
    kinds = found["speed_up"][f"batch {batches[0]}"]
    found["geometric_mean"] = {
        kind: round(math.prod(of[kind] for of in found["speed_up"].values()) ** (1 / len(batches)), 3)
        for kind in kinds
    }
    return found


def _with_statistics(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The model as after training, as far as its speed goes: statistics that are not zero and one."""
    with torch.no_grad():
        model.train()(torch.randn(4, *shape))
    return model.eval()


def _without(model: nn.Module) -> nn.Module:
    bare = copy.deepcopy(model)
    for parent in list(bare.modules()):
        for name, child in parent.named_children():
            if is_normalization(child):
                setattr(parent, name, nn.Identity())
    return bare


def _forward(model: Any, x: torch.Tensor) -> Callable[[], object]:
    return lambda: model(x)
