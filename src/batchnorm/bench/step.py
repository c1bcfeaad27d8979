"""A whole training step of BN-Inception: as its user has it, at its best, accelerated, and without BN."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.bench.timing import in_turns
from batchnorm.models.inception import inception
from batchnorm.surgery import accelerate


def measure(*, batch: int = 32, side: int = 224, rounds: int = 5, save_memory: bool = True) -> dict[str, Any]:
    """Time a training step of each form of the network on one batch.

    Args:
        batch: Images.
        side: Pixels; 224 is the paper's.
        rounds: Samples of each form.
        save_memory: Whether ``accelerate(save_memory=True)`` takes part.

    The form "batchnorm" is the model as its user has it after `accelerate`, which may have chosen
    channels-last for it.

    Returns:
        Seconds of each form (median and quartiles) and the ratios that matter: our speed-up over
        the model as its user has it, and over each layout at its best, and the share of BN's own
        cost that is gone (cost: a step less the same step with BN taken out).
    """
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, 1000, (batch,))
    plain = inception()
    best = in_place(plain)
    last: Any = copy.deepcopy(best)
    last = last.to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    forms: dict[str, tuple[nn.Module, Tensor]] = {
        "eager": (plain, images),
        "eager, in-place ReLU": (best, images),
        "eager, channels last, in-place ReLU": (last, images_last),
        "without BN": (_without_bn(best), images),
        "without BN, channels last": (_without_bn(last), images_last),
        "batchnorm": (accelerate(plain, images[:4])[0], images),
        "batchnorm, channels last": (accelerate(last, images_last[:4])[0], images_last),
    }
    if save_memory:
        saving, _ = accelerate(last, images_last[:4], save_memory=True)
        forms["batchnorm, channels last, save_memory"] = (saving, images_last)
    timings = in_turns(
        {name: _step(net, x, labels) for name, (net, x) in forms.items()}, rounds=rounds, slice_s=0.0
    )
    median = {name: timing.median_s for name, timing in timings.items()}
    ours = min(median["batchnorm"], median["batchnorm, channels last"])
    cost = median["eager, channels last, in-place ReLU"] - median["without BN, channels last"]
    our_cost = median["batchnorm, channels last"] - median["without BN, channels last"]
    return {
        "network": f"BN-Inception, batch {batch}, {side}×{side}",
        "seconds": {
            name: [round(s, 4) for s in (t.median_s, t.low_s, t.high_s)] for name, t in timings.items()
        },
        "ratios": {
            "our best against eager as written": median["eager"] / ours,
            "layout chosen, against contiguous in-place ReLU": median["eager, in-place ReLU"]
            / median["batchnorm"],
            "channels last, against in-place ReLU": median["eager, channels last, in-place ReLU"]
            / median["batchnorm, channels last"],
            "share of BN's own cost gone, channels last": 1 - our_cost / cost,
        },
    }


def _step(net: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    return step


def in_place(net: nn.Module) -> nn.Module:
    """A copy whose ReLUs overwrite their input."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return net


def _without_bn(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return net
