"""One job: a network trained in a domain and, if it is a source, adapted to its targets."""

import time
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.data import ImageData, batch_indices, epoch_order, load
from batchnorm.kernels import keep_freed_memory
from batchnorm.reproduce.adaptation.experiment import Adaptation
from batchnorm.reproduce.adaptation.networks import colour_network, grey_network, images_of, in_domain
from batchnorm.reproduce.parts import keep
from batchnorm.reproduce.pool import advance
from batchnorm.statistics import adapt
from batchnorm.statistics.trust import one_sided

BATCH_SIZE = 128
RATES = {"grey": 0.1, "colour": 0.2}
"""Largest rate of SGD with momentum 0.9, which rises and falls within the training."""
DECAY = 5e-4
CHECKED = 512
"""Examples that predictions before and after are told of."""
BLENDED = 1
"""A size that "blended" alone is tried at."""


def run_part(experiment: Adaptation, name: str, domain: str, seed: int) -> None:
    """Train in a domain; of a source, adapt to each of its targets and measure."""
    keep_freed_memory()
    data = _load(experiment, domain)
    start = time.perf_counter()
    model = train(experiment, data, domain, seed)
    found: dict[str, Any] = {
        "domain": domain,
        "train_s": time.perf_counter() - start,
        "accuracy": accuracy(model, *tested(data, domain, seed)),
    }
    if domain in experiment.sources:
        found["targets"] = {
            target: adapted(experiment, model, target, seed) for target in experiment.targets(domain)
        }
    keep(experiment.out, name, found)


def _load(experiment: Adaptation, domain: str) -> ImageData:
    return load(domain.split()[0], experiment.data_dir, progress=False)


def train(experiment: Adaptation, data: ImageData, domain: str, seed: int) -> nn.Module:
    """The network of the data's kind after its epochs, in evaluation mode."""
    family = "colour" if data.train_images.ndim == 4 else "grey"
    images = in_domain(images_of(data, "train"), domain, 1000 + seed)
    labels = torch.from_numpy(data.train_labels)
    torch.manual_seed(seed)
    model = {"grey": grey_network, "colour": colour_network}[family](len(data.classes))
    steps = num_steps_in(experiment, domain, len(labels))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=RATES[family], momentum=0.9, nesterov=True, weight_decay=DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATES[family], total_steps=steps + 1)
    size = min(BATCH_SIZE, len(labels))
    for step in range(steps):
        chosen = batch_indices(step, size, len(labels), seed)
        x = images[chosen]
        if family == "colour" and step % 2:
            x = x.flip(-1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        advance(1)
    return model.eval()


def num_steps_in(experiment: Adaptation, domain: str, num_examples: int) -> int:
    """Training steps in a domain."""
    return experiment.num_epochs(domain) * (num_examples // min(BATCH_SIZE, num_examples))


def tested(data: ImageData, domain: str, seed: int) -> tuple[Tensor, Tensor]:
    """Test images as the domain has them, and their labels."""
    return in_domain(images_of(data, "test"), domain, 2000 + seed), torch.from_numpy(data.test_labels)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the model, as it stands, puts into their class."""
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


def adapted(experiment: Adaptation, model: nn.Module, target: str, seed: int) -> dict[str, Any]:
    """Accuracy in a target domain, before and after each adaptation, each from the source's network.

    Returns:
        ``before``; ``refused``, whether its predictions would be refused as one-sided; ``runs``, for each
        adaptation "METHOD SIZE" its ``accuracy``, the mean ``entropy`` of its predictions, nats, how far
        the farthest layer's mean ``shift``\\ ed, in deviations, and whether it was ``undone``.
    """
    data = _load(experiment, target)
    images, labels = tested(data, target, seed)
    unlabelled = images_of(data, "train")
    order = epoch_order(0, len(unlabelled), 3000 + seed)[: max(experiment.stream, *experiment.examples)]
    unlabelled = in_domain(unlabelled[order], target, 4000 + seed)
    runs: dict[str, tuple[dict[str, str], list[Tensor]]] = {}
    for size in experiment.examples:
        runs[f"statistics {size}"] = ({"method": "statistics"}, [unlabelled[:size]])
    for size in (BLENDED, *experiment.examples):
        runs[f"blended {size}"] = ({"method": "blended"}, [unlabelled[:size]])
    stream = unlabelled[: experiment.stream]
    for method in ("statistics", "entropy"):
        for size in experiment.stream_batches:
            whole = len(stream) // size * size
            batches = list(stream[:whole].split(size)) if whole else [stream]
            runs[f"{method} stream {size}"] = ({"method": method}, batches)
    found: dict[str, Any] = {"before": accuracy(model, images, labels), "runs": {}}
    for name, (options, batches) in runs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a collapse: it is in the report
            # Trusted: the classes are mixed, as is known here and nowhere else.
            report = adapt(model, batches, trust=True, check=CHECKED, **options)
        with report:
            assert report.before is not None
            assert report.after is not None
            found["runs"][name] = {
                "accuracy": accuracy(model, images, labels),
                "entropy": report.after.entropy,
                "shift": max(layer.shift for layer in report.layers),
                "undone": report.undone is not None,
            }
            if name == f"statistics stream {experiment.stream_batches[-1]}":
                found |= {"refused": one_sided(report.before) is not None, "entropy": report.before.entropy}
    return found


def names(experiment: Adaptation) -> dict[str, tuple[Adaptation, str, str, int]]:
    """All parts by name, with the arguments of `run_part`; the long ones first."""
    found = {}
    for seed in range(experiment.seeds):
        for source in reversed(experiment.sources):
            for domain in (source, *experiment.trained(source)):
                name = f"{domain.replace(' ', '-')}-seed-{seed}"
                found[name] = (experiment, name, domain, seed)
    return found


def num_steps(experiment: Adaptation, name: str) -> int:
    """Steps that the part of this name reports."""
    domain = name.split("-")[0]
    sizes = {"digits": 1438, "mnist": 60_000, "usps": 7291, "cifar10": 50_000}
    return num_steps_in(experiment, domain, sizes[domain])
