"""What accumulated BN, example weighing and whitening buy, and what not: a small network on digits.

Three questions, three seeds each, every part kept in a file, so that a second call does what is missing:

  accumulate  gradients of 32 images in micro-batches of 2 and 4: plain layers, accumulated ones (with a
              window that goes on over steps, and one that starts anew with each), and 32 at once
  evalnorm    training with batches of 2 and 4; evaluation with running statistics, recalibrated
              ones, the weight 1/B, and fitted weights
  whitening   batches of 64, plain against whitened groups of 16, at two rates

Writes result.json; about five minutes on an idle core.
"""

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.files import write_json
from batchnorm.statistics import fit_example_weights
from batchnorm.train.run import environment

SEEDS = (0, 1, 2)
STEPS = {"accumulate": 60, "evalnorm": 1000, "whitening": 100}
RATES = {"accumulate": (0.05,), "evalnorm": (0.02,), "whitening": (0.05, 0.5)}
CHECKS = (20, 50, 100)


Data = tuple[Tensor, Tensor, Tensor, Tensor]


def digits() -> Data:
    """Images (N, 1, 8, 8) from 0 to 1 and labels: 1,197 for training, 600 for the test."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.tensor(found.images[order], dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target[order])
    return images[:-600], labels[:-600], images[-600:], labels[-600:]


def network(seed: int) -> nn.Sequential:
    """Six convolutions with BN and ReLU, and a linear layer."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    shapes = ((1, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    for inputs, outputs, stride in shapes:
        layers.append(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False))
        layers += [bn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def tested(net: nn.Module, data: Data, name: str) -> dict[str, float]:
    """Share of the test images that are told right, and the mean loss, with running statistics."""
    net.eval()
    with torch.no_grad():
        scores = net(data[2])
    net.train()
    right = (scores.argmax(1) == data[3]).double().mean().item()
    return {name: right, f"{name}, loss": nn.functional.cross_entropy(scores, data[3]).item()}


def drawn(num: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of endless batches, an epoch after the other, without the rest of an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(num, generator=generator)
        yield from order[: num // size * size].split(size)


def train(
    net: nn.Module, rate: float, steps: int, size: int, micro: int, seed: int, data: Data,
    after: Callable[[int], None] = lambda step: None,
) -> float:  # fmt: skip
    """Seconds of training with gradients of ``size`` images, in micro-batches."""
    images, labels = data[:2]
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    batches = drawn(len(images), size, seed)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        for part in next(batches).split(micro):
            loss = nn.functional.cross_entropy(net(images[part]), labels[part], reduction="sum") / size
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(step)
    return time.perf_counter() - start


def accumulate(kind: str, micro: int, rate: float, seed: int) -> dict[str, float]:
    """Test accuracy after training with gradients accumulated over 32 images."""
    data, net = digits(), network(seed)
    if kind.startswith("accumulated"):
        net, _ = bn.convert(net, to="accumulated", micro_batches=32 // micro)

    def restart(step: int) -> None:
        for module in net.modules():
            if isinstance(module, bn.layers.Accumulated):
                module.restart()

    anew = restart if kind.endswith("anew") else lambda step: None
    seconds = train(net, rate, STEPS["accumulate"], 32, micro, seed, data, anew)
    found = tested(net, data, "running")
    bn.recalibrate(net, data[0].split(300))
    return {**found, **tested(net, data, "recalibrated"), "seconds": seconds}


def evalnorm(kind: str, size: int, rate: float, seed: int) -> dict[str, float]:
    """Test accuracy of one training, evaluated in each way."""
    data, net = digits(), network(seed)
    train(net, rate, STEPS["evalnorm"], size, size, seed, data)
    found = tested(net, data, "running")
    exact = copy.deepcopy(net)
    bn.recalibrate(exact, data[0].split(300))
    found |= tested(exact, data, "recalibrated")
    for name, base in (("running", net), ("recalibrated", exact)):
        weighed, _ = bn.convert(base, to="evalnorm", batch_size=size)
        found |= tested(weighed, data, f"{name}, 1/B")
        batches = drawn(len(data[0]), size, seed + 100)
        fitted = fit_example_weights(weighed, [data[0][next(batches)] for _ in range(200)])
        found |= tested(weighed, data, f"{name}, fitted")
        found |= {f"{name}, weight of layer {i}": w.new for i, w in enumerate(fitted.layers)}
    with torch.no_grad():
        scores = torch.stack([net(data[2][chosen])[0] for chosen in _around(size, seed, len(data[2]))])
    loss = nn.functional.cross_entropy(scores, data[3]).item()
    right = (scores.argmax(1) == data[3]).double().mean().item()
    return found | {"as in training": right, "as in training, loss": loss}


def _around(size: int, seed: int, num: int) -> Iterator[Tensor]:
    """Every example first in a batch with others of the test set at random."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(num):
        others = torch.randperm(num - 1, generator=generator)[: size - 1]
        yield torch.cat([torch.tensor([i]), others + (others >= i)])


def whitening(kind: str, group: int, rate: float, seed: int) -> dict[str, float]:
    """Test accuracy on the way, with running statistics recalibrated each time."""
    data, net = digits(), network(seed)
    if kind == "whitened":
        net, _ = bn.convert(net, to="whitened", group_channels=group)
    found: dict[str, float] = {}

    def check(step: int) -> None:
        if step in CHECKS:
            twin = copy.deepcopy(net)
            try:
                bn.recalibrate(twin, data[0].split(300))
                found.update(tested(twin, data, f"after {step} steps"))
            except ValueError:  # weights that are not finite
                found.update({f"after {step} steps": 0.1, f"after {step} steps, loss": float("inf")})

    found["seconds"] = train(net, rate, STEPS["whitening"], 64, 64, seed, data, check)
    return found


PARTS: dict[str, tuple[Callable[..., dict[str, float]], list[tuple[str, int]]]] = {
    "evalnorm": (evalnorm, [("plain", size) for size in (2, 4)]),
    "whitening": (whitening, [("plain", 1), ("whitened", 16)]),
    "accumulate": (
        accumulate,
        [
            *(("plain", micro) for micro in (32, 4, 2)),
            *(("accumulated", micro) for micro in (4, 2)),
            ("accumulated anew", 4),
        ],
    ),
}


_RAW = argparse.RawDescriptionHelpFormatter


def main() -> None:
    """Do what is missing, then write the summary and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_RAW)
    parser.add_argument("--out", type=Path, default=Path("results/small-batches"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    summary: dict[str, Any] = {"machine": environment(torch.device("cpu")), "steps": STEPS, "seeds": SEEDS}
    for question, (work, cases) in PARTS.items():
        for kind, size in cases:
            for rate in RATES[question]:
                runs: dict[str, list[float]] = defaultdict(list)
                for seed in SEEDS:
                    path = out / "jobs" / f"{question}-{kind.replace(' ', '-')}-{size}-{rate}-{seed}.json"
                    if not path.exists():
                        write_json(path, work(kind, size, rate, seed))
                    for name, value in json.loads(path.read_text()).items():
                        runs[name].append(value)
                name = f"{question}, {kind}, {size}, rate {rate}"
                summary[name] = {
                    n: {"mean": statistics.mean(v), "deviation": statistics.stdev(v), "runs": v}
                    for n, v in runs.items()
                }
                line = [f"{n} {statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for n, v in runs.items()]
                print(f"{name}: {'; '.join(line)}", flush=True)
    write_json(out / "result.json", summary)


if __name__ == "__main__":
    main()
