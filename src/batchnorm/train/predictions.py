"""Class probabilities of a saved run, by one crop or many, kept so that an ensemble costs no second pass."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from batchnorm import files
from batchnorm.data import ImageData, load
from batchnorm.train.build import build_model, process_settings, resolve_device
from batchnorm.train.checkpoint import MODEL_FILE as CHECKPOINT_FILE
from batchnorm.train.checkpoint import find_checkpoint
from batchnorm.train.feed import Crops, MemoryFeed
from batchnorm.train.recipe import Recipe
from batchnorm.train.run import CHECKPOINTS, MODEL_FILE, data_facts, load_model, read_run
from batchnorm.train.statistics import with_population_statistics

FOLDER = "predictions"


@torch.no_grad()
def log_probabilities(model: nn.Module, views: Iterable[Iterable[Tensor]]) -> Tensor:
    """Logarithm of the class probabilities: the mean over the views of softmax of the model's logits.

    Args:
        model: In evaluation mode.
        views: For each part of the images, its views one after the other: inputs on the model's device.

    Returns:
        float64, shape (N, classes), on the CPU.

    Source: Ioffe & Szegedy (2015), section 4.2.3: the arithmetic mean of class probabilities.
    """
    parts = []
    for part in views:
        # One at a time: 144 views of a batch would not fit side by side.
        said = torch.stack([model(view).double().cpu().log_softmax(1) for view in part])
        parts.append(mean_log_probabilities(said))
    return torch.cat(parts)


def mean_log_probabilities(log_probabilities: Tensor) -> Tensor:
    """Logarithm of the arithmetic mean of probabilities over the first dimension, (K, N, classes)."""
    return log_probabilities.logsumexp(0) - math.log(len(log_probabilities))


def run_predictions(
    folder: Path,
    *,
    data_dir: str | Path | None = None,
    checkpoint: str | None = None,
    crops: Crops = 1,
) -> tuple[Tensor, ImageData]:
    """Log-probabilities of a run on its test set, and its data.

    They are kept in the run's folder, with the checksum of the weights that made them, and read
    from there the next time.

    Args:
        folder: The run.
        data_dir: Where its data are looked for, as in `batchnorm.data.load`.
        checkpoint: `newest`, `best` or a step, with population statistics computed afresh; None for the
            finished run's model.
        crops: Views of each image.

    Returns:
        float64, shape (N, classes), and the data.

    Raises:
        FileNotFoundError: It is no run, is not finished, or has no such checkpoint.
        ValueError: A file is damaged, or the data are not those that it was trained on.
    """
    recipe, facts = read_run(folder)
    data = load(facts["name"], data_dir, size=facts["image_shape"][-1])
    if (found := data_facts(data)) != facts:
        raise ValueError(f"{folder} was trained on other data: {facts}, and {data.name} is now {found}.")
    weights = _weights_file(folder, checkpoint)
    said_of = {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "",
        "data": str(facts["sha256"]),
        "crops": str(crops),
        "statistics": "afresh" if checkpoint else "saved",
    }
    key = hashlib.sha256(json.dumps(said_of, sort_keys=True).encode()).hexdigest()[:16]
    kept = folder / FOLDER / f"crops-{crops}-{key}.safetensors"
    predictions = _read(kept, said_of)
    if predictions is None:
        predictions = _predict(folder, recipe, data, checkpoint, crops)
        kept.parent.mkdir(exist_ok=True)
        files.write_bytes(kept, safetensors.torch.save({"log_probabilities": predictions}, said_of))
    return predictions, data


def _weights_file(folder: Path, checkpoint: str | None) -> Path:
    if checkpoint is None:
        return folder / MODEL_FILE
    return find_checkpoint(folder / CHECKPOINTS, checkpoint) / CHECKPOINT_FILE


def _read(path: Path, said_of: dict[str, str]) -> Tensor | None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor("log_probabilities") if file.metadata() == said_of else None
    except (OSError, SafetensorError):
        return None  # Not there, or damaged: it is made again.


def _predict(folder: Path, recipe: Recipe, data: ImageData, checkpoint: str | None, crops: Crops) -> Tensor:
    device = resolve_device(recipe.device)
    with process_settings(recipe, device):
        model = build_model(recipe, data.image_shape, len(data.classes))
        load_model(folder, model, checkpoint)
        model.to(device).eval()
        feed = MemoryFeed(recipe, data, device)
        if checkpoint is not None:
            model = with_population_statistics(model, feed.statistics, method=feed.statistics_method)
        return log_probabilities(model, feed.test(crops))
