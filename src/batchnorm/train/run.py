"""The folder of one training run: who may write there, what it belongs to, what it holds."""

import fcntl
import hashlib
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchnorm import files
from batchnorm.data import ImageData
from batchnorm.reading import parse_safetensors, read_json
from batchnorm.train.checkpoint import find_checkpoint, load_checkpoint
from batchnorm.train.feed import Data
from batchnorm.train.recipe import InceptionRecipe, Recipe

FORMAT = 1
RECIPE_FILE, ENVIRONMENT_FILE, METRICS_FILE = "recipe.json", "environment.json", "metrics.jsonl"
MODEL_FILE, CHECKPOINTS, TENSORBOARD, LOCK_FILE = (
    "model.safetensors",
    "checkpoints",
    "tensorboard",
    "run.lock",
)

DATA_FACTS = {"name", "image_shape", "num_train", "num_test", "sha256"}
"""What `data_facts` tells."""


@contextmanager
def open_run(
    folder: Path, recipe: Recipe, data: Data, device: torch.device, *, num_ranks: int = 1
) -> Iterator[Path]:
    """Make the folder of a new run, or check that the one there is this recipe's, and hold it alone.

    Args:
        folder: The run's folder; made with its parents if absent.
        recipe: What is about to be trained.
        data: On what.
        device: Where.
        num_ranks: On how many ranks.

    Yields:
        `folder`, with recipe.json and environment.json written.

    Raises:
        ValueError: The folder holds something else, or the run of another recipe or of other data.
        BlockingIOError: Another process is training there.

    Warns:
        UserWarning: The environment changed since the run was last started, so that the result need not be
            bit-identical to that of an uninterrupted run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        files.remove_partial(folder)
        if (folder / RECIPE_FILE).exists():
            _check_same(folder, recipe, data)
        elif others := sorted(path.name for path in folder.iterdir() if path.name != LOCK_FILE):
            raise ValueError(
                f"{folder} holds {', '.join(others[:5])} but no {RECIPE_FILE}, so it is not a run: "
                "give an empty or new folder."
            )
        else:
            written = {"format": FORMAT, "recipe": recipe.to_json(), "data": data_facts(data, recipe)}
            files.write_json(folder / RECIPE_FILE, written)
        _write_environment(folder, environment(device, num_ranks))
        yield folder


def read_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run, and the facts about its data as `data_facts` gives them.

    Raises:
        FileNotFoundError: `folder` is not a run.
        ValueError: recipe.json is damaged or has fields that this version does not know.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run: it has no {RECIPE_FILE}.")
    try:
        written = read_json(path)
        if not isinstance(written, dict) or set(written) != {"format", "recipe", "data"}:
            raise ValueError("expected an object with format, recipe and data")
        if written["format"] != FORMAT:
            raise ValueError(f"its format is {written['format']!r} and this version reads {FORMAT}")
        recipe, facts = written["recipe"], written["data"]
        if not isinstance(recipe, dict) or not isinstance(facts, dict) or set(facts) != DATA_FACTS:
            raise ValueError(f"recipe must be an object, and data one with {', '.join(sorted(DATA_FACTS))}")
        return Recipe.from_json(recipe), facts
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def load_model(folder: Path, model: nn.Module, checkpoint: str | None = None) -> None:
    """Load a run's weights into `model`, in place.

    Args:
        folder: The run.
        model: Built by the run's recipe.
        checkpoint: `newest`, `best` or a step; None for the finished run's model, whose BN layers
            hold population statistics.

    Raises:
        FileNotFoundError: The run is not finished, or has no such checkpoint.
        ValueError: The file is damaged or belongs to another network.
    """
    if checkpoint is not None:
        path = find_checkpoint(folder / CHECKPOINTS, checkpoint)
        tensors = load_checkpoint(path).model
    else:
        path = folder / MODEL_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is not finished: it has no {MODEL_FILE}. Train on, or name a checkpoint."
            )
        try:
            tensors = parse_safetensors(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: {error}. Delete it and train again to have it rewritten."
            ) from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the network of {folder / RECIPE_FILE}: {error}") from error


def image_shape(recipe: Recipe, data: Data) -> tuple[int, ...]:
    """Of one input of the recipe's network: (H, W) in grey, (3, H, W) in colour."""
    if isinstance(data, ImageData):
        return data.image_shape
    assert isinstance(recipe, InceptionRecipe)
    return (3, recipe.image_size, recipe.image_size)


def data_facts(data: Data, recipe: Recipe) -> dict[str, Any]:
    """What identifies the data of a run: name, sizes, and a checksum.

    The checksum is of all images and labels where they are in memory, and of all names and labels
    where they are on disk, as there may be terabytes.
    """
    digest = hashlib.sha256()
    if isinstance(data, ImageData):
        num_train, num_test = len(data.train_images), len(data.test_images)
        for array in (data.train_images, data.train_labels, data.test_images, data.test_labels):
            digest.update(array.tobytes())
    else:
        num_train, num_test = len(data.train), len(data.val)
        for part in (data.train, data.val):
            digest.update(part.labels.tobytes())
            for index in range(len(part)):
                digest.update(Path(part.name(index)).name.encode() + b"\0")
    return {
        "name": data.name,
        "image_shape": list(image_shape(recipe, data)),
        "num_train": num_train,
        "num_test": num_test,
        "sha256": digest.hexdigest(),
    }


def environment(device: torch.device, num_ranks: int = 1) -> dict[str, Any]:
    """Versions and hardware that floating-point results may depend on."""
    packages = {name: version(name) for name in ("batchnorm", "torch", "numpy", "numba", "safetensors")}
    return {
        "python": platform.python_version(),
        **packages,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": num_ranks,
    }


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    # The kernel drops the lock with the process, so a killed run never locks its folder for good.
    with open(folder / LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BlockingIOError(
                error.errno,
                f"Another process ({file.read().strip() or 'unknown'}) is training in {folder}: "
                "wait for it, stop it, or give another folder",
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()}\n")
        file.flush()
        yield


def _check_same(folder: Path, recipe: Recipe, data: Data) -> None:
    earlier, facts = read_run(folder)
    differences = recipe.differences(earlier)
    now = data_facts(data, recipe)
    differences += [
        f"data {name} (asked for {now[name]!r}, there {facts[name]!r})"
        for name in now
        # Images on disk may have been moved.
        if now[name] != facts[name] and not (name == "name" and not isinstance(data, ImageData))
    ]
    if differences:
        raise ValueError(
            f"{folder} holds the run of another recipe, which differs in {', '.join(differences)}. "
            "Give another folder, or the same values to go on with that run."
        )


def _write_environment(folder: Path, now: dict[str, Any]) -> None:
    path = folder / ENVIRONMENT_FILE
    earlier: Any = None
    if path.exists():
        try:
            earlier = read_json(path)
        except ValueError:
            earlier = None
    if isinstance(earlier, dict):
        # Before there were several, nothing was said of them.
        earlier = {"ranks": 1} | earlier
    if isinstance(earlier, dict) and earlier != now:
        changes = [
            f"{name} {earlier.get(name)} → {now[name]}" for name in now if earlier.get(name) != now[name]
        ]
        warnings.warn(
            f"{folder}: the environment changed since this run was last started ({', '.join(changes)}). "
            "It goes on, but need not end with the same bits as an uninterrupted run.",
            stacklevel=2,
        )
    if earlier != now:
        files.write_json(path, now)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
