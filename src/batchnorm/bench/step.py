"""A whole training step of BN-Inception: as its user has it, at its best, accelerated, and without BN."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.bench.timing import MEMORY, MemorySetting, Timing, process, synchronize
from batchnorm.models.inception import inception
from batchnorm.surgery import accelerate

_steps: dict[str, Callable[[], object]] = {}
"""Forms that this process has prepared."""

_NUM_WARM = 3
"""Steps of each form that are not counted: libraries set up, heaps grow to their size."""


Network = Literal["inception", "cifar10"]
NETWORKS: dict[Network, str] = {
    "inception": "BN-Inception, 224×224",
    "cifar10": "BN-Inception at the scale of CIFAR-10, 32×32",
}


def measure(
    *,
    network: Network = "inception",
    batch: int = 32,
    rounds: int = 7,
    memory: Sequence[MemorySetting] = MEMORY,
    compiled: bool = False,
    threads: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Time a training step of each form of the network on one batch.

    Args:
        network: BN-Inception at 224×224 pixels, or the one that ``--scale cifar10`` trains, at 32×32.
        batch: Images.
        rounds: Samples of each form, in which all forms and all settings of the memory take turns.
        memory: Settings, each in a process of its own.
        compiled: Whether `torch.compile` takes part, with and without `accelerate`.
        threads: PyTorch's threads; 0 leaves its own choice.
        progress: Told what is going on.

    The form "batchnorm" is the model as its user has it after `accelerate`, which may have chosen
    channels-last for it.

    Returns:
        Seconds of each form by setting (median and quartiles) and the ratios that matter: our
        speed-up over the model as its user has it, and over each layout at its best, and the
        share of BN's own cost that is gone (cost: a step less the same step with BN taken out).
    """
    samples: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        workers = {setting: stack.enter_context(process(setting, threads)) for setting in memory}
        for setting, worker in workers.items():
            progress(f"memory {setting}: preparing")
            forms = worker.submit(_prepare, network, batch, compiled).result()
            samples[setting] = {form: [] for form in forms}
        for turn in range(rounds):
            progress(f"round {turn + 1} of {rounds}")
            for setting, worker in workers.items():
                for form, seconds in worker.submit(_round, turn).result().items():
                    samples[setting][form].append(seconds)
    timings = {s: {form: Timing.of(taken) for form, taken in of.items()} for s, of in samples.items()}
    return {
        "network": f"{NETWORKS[network]}, batch {batch}",
        "seconds": {
            setting: {form: [round(s, 4) for s in (t.median_s, t.low_s, t.high_s)] for form, t in of.items()}
            for setting, of in timings.items()
        },
        "ratios": _ratios(
            {setting: {form: t.median_s for form, t in of.items()} for setting, of in timings.items()}
        ),
    }


def _ratios(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By setting; under "accelerate" what a user gains who has left everything as it was."""
    found: dict[str, dict[str, float]] = {}
    if {"default", "kept"} <= seconds.keys():
        was, ours = seconds["default"], seconds["kept"]["batchnorm"]
        found["accelerate, which keeps memory, against memory as it was"] = {
            "eager as written": was["eager"] / ours,
            "eager, in-place ReLU": was["eager, in-place ReLU"] / ours,
            "eager, channels last, in-place ReLU": was["eager, channels last, in-place ReLU"] / ours,
        }
    for setting, s in seconds.items():
        last, bare = s["eager, channels last, in-place ReLU"], s["without BN, channels last"]
        ours = s["batchnorm, channels last"]
        found[f"memory {setting}"] = {
            "eager as written": s["eager"] / s["batchnorm"],
            "eager, in-place ReLU": s["eager, in-place ReLU"] / s["batchnorm"],
            "channels last: eager, in-place ReLU": last / ours,
            "channels last: share of BN's own cost gone": 1 - (ours - bare) / (last - bare),
            "channels last: time of save_memory": s["batchnorm, channels last, save_memory"] / ours,
        }
        if "torch.compile: batchnorm" in s:
            bare = s["torch.compile: eager, in-place ReLU"]
            found[f"memory {setting}"] |= {
                "torch.compile of the model": bare / s["batchnorm"],
                "torch.compile, without and with accelerate": bare / s["torch.compile: batchnorm"],
            }
    return {name: {k: round(v, 3) for k, v in of.items()} for name, of in found.items()}


def _prepare(network: Network, batch: int, compiled: bool) -> list[str]:
    """Make the forms, in the process that is to run them, and let each take its first steps."""
    if network == "inception":
        plain, side, classes = inception(), 224, 1000
    else:
        plain, side, classes = inception(10, stem="cifar", width=0.25, separable=True), 32, 10
    images, labels = torch.randn(batch, 3, side, side), torch.randint(0, classes, (batch,))
    best = in_place(plain)
    last: Any = copy.deepcopy(best)
    last = last.to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)
    example, example_last = images[:4], images_last[:4]

    def ours(net: nn.Module, example: Tensor, save_memory: bool = False) -> nn.Module:
        return accelerate(net, example, save_memory=save_memory, keep_memory=False)[0]

    forms: dict[str, tuple[Any, Tensor]] = {
        "eager": (plain, images),
        "eager, in-place ReLU": (best, images),
        "eager, channels last, in-place ReLU": (last, images_last),
        "without BN": (_without_bn(best), images),
        "without BN, channels last": (_without_bn(last), images_last),
        "batchnorm": (ours(plain, example), images),
        "batchnorm, channels last": (ours(last, example_last), images_last),
        "batchnorm, channels last, save_memory": (ours(last, example_last, True), images_last),
    }
    if compiled:
        for name in ("eager, in-place ReLU", "batchnorm", "batchnorm, channels last"):
            net, x = forms[name]
            forms[f"torch.compile: {name}"] = (torch.compile(copy.deepcopy(net), dynamic=False), x)
    _steps.update({name: _step(net, x, labels) for name, (net, x) in forms.items()})
    for step in _steps.values():
        for _ in range(_NUM_WARM):
            step()
    return list(_steps)


def _round(turn: int) -> dict[str, float]:
    """Seconds of one step of each form, in an order that rotates with the turn."""
    names, seconds = list(_steps), {}
    shift = turn % len(names)
    for name in names[shift:] + names[:shift]:
        synchronize()
        start = time.perf_counter()
        _steps[name]()
        synchronize()
        seconds[name] = time.perf_counter() - start
    return seconds


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
