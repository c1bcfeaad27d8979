"""Class probabilities of a saved run, by one crop or many, kept so that an ensemble costs no second pass."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from batchnorm import files
from batchnorm.data import SOURCES, load, open_images
from batchnorm.train.build import build_model, process_settings, resolve_device
from batchnorm.train.checkpoint import MODEL_FILE as CHECKPOINT_FILE
from batchnorm.train.checkpoint import find_checkpoint
from batchnorm.train.feed import Data, Part, feed_of
from batchnorm.train.inputs import Crops
from batchnorm.train.recipe import InceptionRecipe, Recipe
from batchnorm.train.run import CHECKPOINTS, MODEL_FILE, data_facts, image_shape, load_model, read_run
from batchnorm.train.statistics import with_population_statistics

FOLDER = "predictions"


@dataclass(frozen=True)
class Predictions:
    """What a network says of the images of a test set."""

    log_probabilities: Tensor
    """float64, shape (N, classes), on the CPU."""
    labels: np.ndarray
    """int64, shape (N,): the truth."""


@torch.no_grad()
def predict(model: nn.Module, parts: Iterable[Part]) -> Predictions:
    """Logarithm of the class probabilities: the mean over the views of softmax of the model's logits.

    Args:
        model: In evaluation mode.
        parts: Inputs on the model's device, view by view, and labels.

    Source: Ioffe & Szegedy (2015), section 4.2.3: the arithmetic mean of class probabilities.
    """
    said, labels = [], []
    for part in parts:
        # One at a time: 144 views of a batch would not fit side by side.
        each = torch.stack([model(view).double().cpu().log_softmax(1) for view in part.views])
        said.append(mean_log_probabilities(each))
        labels.append(part.labels)
    if not said:
        # A rank among more than there are images; two classes, so that the shape can be used.
        return Predictions(torch.zeros(0, 2, dtype=torch.float64), np.zeros(0, dtype=np.int64))
    return Predictions(torch.cat(said), np.concatenate(labels))


def mean_log_probabilities(log_probabilities: Tensor) -> Tensor:
    """Logarithm of the arithmetic mean of probabilities over the first dimension, (K, N, classes)."""
    return log_probabilities.logsumexp(0) - math.log(len(log_probabilities))


def run_predictions(
    folder: Path,
    *,
    data_dir: str | Path | None = None,
    checkpoint: str | None = None,
    crops: Crops = 1,
    num_workers: int | None = None,
) -> tuple[Predictions, Data]:
    """What a run's network says of its test set, and its data.

    They are kept in the run's folder, with the checksum of the weights that made them, and read
    from there the next time.

    Args:
        folder: The run.
        data_dir: Where its data are looked for, as in `batchnorm.data.load`.
        checkpoint: `newest`, `best` or a step, with population statistics computed afresh; None for the
            finished run's model.
        crops: Views of each image.
        num_workers: Processes that decode images on disk; see `batchnorm.train.feed.feed_of`.

    Raises:
        FileNotFoundError: It is no run, is not finished, or has no such checkpoint.
        ValueError: A file is damaged, or the data are not those that it was trained on.
    """
    recipe, facts = read_run(folder)
    data = data_of(facts, data_dir)
    found = data_facts(data, recipe)
    # Images on disk may have been moved.
    if found | {"name": facts["name"]} != facts:
        raise ValueError(f"{folder} was trained on other data: {facts}, and {data.name} is now {found}.")
    weights = _weights_file(folder, checkpoint)
    said_of = {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "",
        "data": str(facts["sha256"]),
        "crops": str(crops),
        "statistics": "afresh" if checkpoint else "saved",
    }
    if crops != 1 and isinstance(recipe, InceptionRecipe):
        said_of["views"] = recipe.crops
    key = hashlib.sha256(json.dumps(said_of, sort_keys=True).encode()).hexdigest()[:16]
    kept = folder / FOLDER / f"crops-{crops}-{key}.safetensors"
    predictions = _read(kept, said_of)
    if predictions is None:
        predictions = _predict(folder, recipe, data, checkpoint, crops, num_workers)
        kept.parent.mkdir(exist_ok=True)
        tensors = {
            "log_probabilities": predictions.log_probabilities,
            "labels": torch.from_numpy(predictions.labels),
        }
        # One entry only: safetensors writes several in random order.
        files.write_bytes(kept, safetensors.torch.save(tensors, {"of": json.dumps(said_of)}))
    return predictions, data


def data_of(facts: Mapping[str, Any], data_dir: str | Path | None = None) -> Data:
    """The data that a run's facts tell of, by name or from where they were."""
    if facts["name"] in SOURCES:
        return load(facts["name"], data_dir, size=facts["image_shape"][-1])
    return open_images(facts["name"] if data_dir is None else data_dir)


def _weights_file(folder: Path, checkpoint: str | None) -> Path:
    if checkpoint is None:
        return folder / MODEL_FILE
    return find_checkpoint(folder / CHECKPOINTS, checkpoint) / CHECKPOINT_FILE


def _read(path: Path, said_of: dict[str, str]) -> Predictions | None:
    try:
        with safetensors.safe_open(path, "pt") as file:
            if file.metadata() != {"of": json.dumps(said_of)}:
                return None
            return Predictions(file.get_tensor("log_probabilities"), file.get_tensor("labels").numpy())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None  # Not there, or damaged: it is made again.


def _predict(
    folder: Path, recipe: Recipe, data: Data, checkpoint: str | None, crops: Crops, num_workers: int | None
) -> Predictions:
    device = resolve_device(recipe.device)
    with process_settings(recipe, device):
        model = build_model(recipe, image_shape(recipe, data), len(data.classes))
        load_model(folder, model, checkpoint)
        model.to(device).eval()
        feed = feed_of(recipe, data, device, num_workers)
        if checkpoint is not None:
            model = with_population_statistics(model, feed.statistics, method=feed.statistics_method)
        return predict(model, feed.test(crops))
