"""Figure 1's networks trained by `batchnorm reproduce activations` and by plain PyTorch loops, side by side.

The rival is the loop that one would write: one network a loop, `torch.nn` layers, `torch.optim.SGD`, one
thread, as many loops at once as there are cores. Both train the same networks on the same batches. They take
turns in slices of a few hundred steps, in the same two processes, so that whatever else the machine does
meets both; a slice's cost is time per step and network.

    make bench            writes benchmarks/results/activations.json
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from batchnorm.data import batch_indices, load, to_input
from batchnorm.models import mlp
from batchnorm.models.stack import StackedMLP
from batchnorm.reproduce.pool import num_cores

RATES = (0.05, 0.1, 0.5, 1.0)
BATCH = 60


def plain_network(normalize: bool) -> nn.Sequential:
    """The paper's network as torch.nn has it, BN before each sigmoid."""
    layers: list[nn.Module] = []
    for layer in mlp(seed=0):
        if isinstance(layer, nn.Sigmoid) and normalize:
            layers[-1].bias = None
            layers.append(nn.BatchNorm1d(layers[-1].out_features))
        layers.append(layer)
    return nn.Sequential(*layers)


def plain_loop(normalize, images, labels):
    net = plain_network(normalize)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step(number: int) -> None:
        chosen = batch_indices(number, BATCH, len(labels), 0)
        loss = F.cross_entropy(net(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, 1


def stacked_loop(normalize, images, labels):
    net = StackedMLP(len(RATES), normalize=normalize, seed=0)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    rates = torch.tensor(RATES)

    def step(number: int) -> None:
        chosen = batch_indices(number, BATCH, len(labels), 0)
        loss = net.losses(images[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward(rates)
        optimizer.step()

    return step, len(RATES)


LOOPS = {"plain loop": plain_loop, "batchnorm": stacked_loop}


def core(rounds: int, slice_steps: int, data: str, data_dir: str | None, meet, results) -> None:
    """One process a core; all of them time the same slice at the same moment."""
    torch.set_num_threads(1)
    source = load(data, data_dir, progress=False)
    images = to_input(torch.from_numpy(source.train_images), binarize=True).flatten(1)
    labels = torch.from_numpy(source.train_labels)
    steps = {
        (name, normalize): make(normalize, images, labels)
        for name, make in LOOPS.items()
        for normalize in (False, True)
    }
    for round_number in range(rounds + 1):
        for case, (step, num_networks) in steps.items():
            meet.wait()
            start = time.perf_counter()
            for number in range(slice_steps // num_networks):
                step(number)
            taken = (time.perf_counter() - start) / (slice_steps // num_networks * num_networks)
            if round_number:  # the first round warms up
                results.put((*case, taken * 1e3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slice-steps", type=int, default=400, help="network-steps in a slice")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "activations.json")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    num = num_cores()
    meet, results = context.Barrier(num), context.Queue()
    arguments = (options.rounds, options.slice_steps, options.data, options.data_dir, meet, results)
    processes = [context.Process(target=core, args=arguments) for _ in range(num)]
    for process in processes:
        process.start()
    samples = [results.get() for _ in range(num * options.rounds * len(LOOPS) * 2)]
    for process in processes:
        process.join()

    table = {}
    for normalize in (False, True):
        row = {}
        for name in LOOPS:
            times = sorted(t for loop, kind, t in samples if (loop, kind) == (name, normalize))
            low, median, high = statistics.quantiles(times, n=4)
            row[name] = {"median_ms": round(median, 4), "quartiles_ms": [round(low, 4), round(high, 4)]}
        row["speed_up"] = round(row["plain loop"]["median_ms"] / row["batchnorm"]["median_ms"], 3)
        table["with BN" if normalize else "plain"] = row
        print(f"{'with BN' if normalize else 'plain':8}", json.dumps(row))
    machine = {
        "cpu": cpu_name(),
        "processes": num,
        "threads_each": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    settings = {"data": options.data, "rates": RATES, "rounds": options.rounds, "slice": options.slice_steps}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine, "settings": settings, "ms_per_step_and_network": table}
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written: {options.out}")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
