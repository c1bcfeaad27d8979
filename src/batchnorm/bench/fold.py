"""Inference with and without `batchnorm.fold`: eager and compiled, one image and many."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from batchnorm.bench.step import NETWORKS, Network
from batchnorm.bench.timing import in_turns
from batchnorm.models.inception import inception
from batchnorm.surgery import fold
from batchnorm.surgery.kinds import is_normalization

EAGER, COMPILED = "eval()", "torch.compile of eval()"


def measure(
    *,
    network: Network = "inception",
    batches: Sequence[int] = (1, 32),
    rounds: int = 9,
    compiled: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time the forward of a network and of what `fold` makes of it.

    Args:
        network: One of `step.NETWORKS`.
        batches: Numbers of images.
        rounds: Samples of each form, in which all forms take turns.
        compiled: Whether `torch.compile` takes part, with and without `fold`.
        progress: Told what is going on.

    Returns:
        By batch, milliseconds of each form (median and quartiles) and the speed-up of the folded model over
        ``eval()``, eager and compiled; the speed-ups' geometric means; the normalizations left and the
        largest relative difference of the outputs.
    """
    plain, side = _network(network)
    plain = _with_statistics(plain, side)
    folded, proof = fold(plain, torch.randn(2, 3, side, side))
    models: dict[str, Any] = {EAGER: plain, "folded": folded}
    if compiled:
        models[COMPILED] = torch.compile(copy.deepcopy(plain), dynamic=False)
        models["torch.compile of folded"] = torch.compile(copy.deepcopy(folded), dynamic=False)
    found: dict[str, Any] = {
        "network": NETWORKS[network],
        "left": sum(is_normalization(m) for m in folded.modules()) + len(proof.alone),
        "folded": len(proof.folds),
        "difference": proof.check,
        "milliseconds": {},
        "speed_up": {},
    }
    with torch.inference_mode():
        for batch in batches:
            progress(f"batch {batch}")
            x = torch.randn(batch, 3, side, side)
            forms = {name: _forward(model, x) for name, model in models.items()}
            times = in_turns(forms, rounds=rounds)
            found["milliseconds"][f"batch {batch}"] = {
                name: [round(s * 1e3, 3) for s in (t.median_s, t.low_s, t.high_s)]
                for name, t in times.items()
            }
            ratios = {"eager": times[EAGER].median_s / times["folded"].median_s}
            if compiled:
                ratios["compiled"] = times[COMPILED].median_s / times["torch.compile of folded"].median_s
            found["speed_up"][f"batch {batch}"] = {name: round(r, 3) for name, r in ratios.items()}
    kinds = found["speed_up"][f"batch {batches[0]}"]
    found["geometric_mean"] = {
        kind: round(math.prod(of[kind] for of in found["speed_up"].values()) ** (1 / len(batches)), 3)
        for kind in kinds
    }
    return found


def _network(network: Network) -> tuple[nn.Module, int]:
    if network == "inception":
        return inception(seed=0), 224
    return inception(10, stem="cifar", width=0.25, separable=True, seed=0), 32


def _with_statistics(model: nn.Module, side: int) -> nn.Module:
    """The model as after training, as far as its speed goes: statistics that are not zero and one."""
    with torch.no_grad():
        model.train()(torch.randn(4, 3, side, side))
    return model.eval()


def _forward(model: Any, x: torch.Tensor) -> Callable[[], object]:
    return lambda: model(x)
