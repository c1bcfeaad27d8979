"""`bn.choose` on a small convolutional network for CIFAR-10 at several batch sizes: results/choose.

python benchmarks/choose.py results/choose --budget 300 --batch-sizes 2 8 64
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import batchnorm as bn
from batchnorm.data import load, to_input

EXAMPLES = 20_000


def network() -> nn.Module:
    """Three convolutions of stride 2, each with BN and ReLU, and a linear layer."""
    layers: list[nn.Module] = []
    inputs = 3
    for channels in (16, 32, 64):
        conv = nn.Conv2d(inputs, channels, 3, stride=2, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def examples(data_dir: Path | None) -> tuple[Tensor, Tensor]:
    data = load("cifar10", data_dir)
    images = to_input(torch.from_numpy(data.train_images[:EXAMPLES]))
    std, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    return (images - mean) / std, torch.from_numpy(data.train_labels[:EXAMPLES])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds for each batch size")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 8, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = examples(arguments.data_dir)
    for batch_size in arguments.batch_sizes:
        choice = bn.choose(network, data, batch_size=batch_size, budget_s=arguments.budget)
        print(f"batch size {batch_size}\n{choice}\n", flush=True)
        choice.save(arguments.out / f"cifar10-batch-{batch_size}.json")


if __name__ == "__main__":
    main()
