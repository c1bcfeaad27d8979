"""The state of a training run as a folder of safetensors and JSON, checked when it is read back."""

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from batchnorm import files
from batchnorm.reading import parse_json, parse_safetensors, read_json
from batchnorm.train.ranks import Ranks

FORMAT = 1
NUM_KEPT = 2
"""Newest checkpoints that `prune` keeps, beside the best."""

MODEL_FILE, TRAINING_FILE, STATE_FILE = "model.safetensors", "training.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next step depends on."""

    step: int
    """Steps taken so far."""
    model: Mapping[str, Tensor]
    """The model's state dict."""
    training: Mapping[str, Tensor]
    """Tensors of the optimizer, random number generators and unreported losses, by dotted name."""
    facts: Mapping[str, Any]
    """The rest, as JSON values; `accuracy` is that of the evaluation at this step, or None."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write `folder/step-N` so that it is there whole or not at all.

    Args:
        folder: The run's checkpoint folder; made if absent.
        checkpoint: What to write. Tensors may be on any device and share memory.

    Returns:
        The new folder, holding model.safetensors, training.safetensors and state.json, which has the
        size and checksum of the other two.

    Raises:
        OSError: The disk refused; earlier checkpoints are untouched.
    """
    folder.mkdir(exist_ok=True)
    parts = {MODEL_FILE: to_safetensors(checkpoint.model), TRAINING_FILE: to_safetensors(checkpoint.training)}
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        **checkpoint.facts,
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in parts.items()
        },
    }
    path = folder / f"step-{checkpoint.step}"
    files.write_folder(path, {**parts, STATE_FILE: files.to_json(state)})
    return path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint folder and check it against its own checksums.

    Raises:
        ValueError: A file is missing, cut short or changed, or of another format; the message says which.
    """
    state = _read_state(path)
    parts = {}
    for name in (MODEL_FILE, TRAINING_FILE):
        try:
            data = (path / name).read_bytes()
            expected = state["files"][name]
            if len(data) != expected["bytes"]:
                raise ValueError(f"{len(data)} bytes where {expected['bytes']} were written")
            if hashlib.sha256(data).hexdigest() != expected["sha256"]:
                raise ValueError("its checksum is not the one written")
            parts[name] = parse_safetensors(data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / name} is missing or damaged: {error}") from error
    facts = {name: value for name, value in state.items() if name not in ("format", "step", "files")}
    return Checkpoint(state["step"], parts[MODEL_FILE], parts[TRAINING_FILE], facts)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None; a damaged newer one is passed over with a warning."""
    for path in _by_step(folder):
        try:
            return load_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"Passing over a checkpoint: {error}", stacklevel=2)
    return None


def share_checkpoint(ranks: Ranks, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """What rank 0 has read, on all ranks: the others may be on machines that do not see its folder."""
    if ranks.num == 1:
        return checkpoint
    parts = [b"", b"", b""]
    if checkpoint is not None:
        facts = {"step": checkpoint.step, "facts": dict(checkpoint.facts)}
        parts = [
            to_safetensors(checkpoint.model),
            to_safetensors(checkpoint.training),
            files.to_json(facts),
        ]
    model, training, told = (ranks.broadcast(part) for part in parts)
    if not told:
        return None
    said = parse_json(told)
    load = parse_safetensors
    return Checkpoint(said["step"], load(model), load(training), said["facts"])


def share_state(ranks: Ranks, model: nn.Module) -> None:
    """Load into every rank's model what rank 0's holds, in place."""
    if ranks.num > 1:
        whole = ranks.broadcast(to_safetensors(model.state_dict()) if ranks.is_first else None)
        model.load_state_dict(safetensors.torch.load(whole))


def find_checkpoint(folder: Path, which: str) -> Path:
    """The folder of the checkpoint called `newest`, `best` (by accuracy), or by its step.

    Raises:
        FileNotFoundError: There is none; the message lists those there are.
    """
    paths = _by_step(folder)
    if which == "newest" and paths:
        return paths[0]
    if which == "best" and (best := _best(paths)):
        return best
    if (path := folder / f"step-{which}") in paths:
        return path
    have = (
        ", ".join(["newest", "best", *(path.name.removeprefix("step-") for path in paths)])
        if paths
        else "none"
    )
    raise FileNotFoundError(f"No checkpoint {which!r} in {folder}; there are: {have}.")


def prune(folder: Path) -> None:
    """Delete all checkpoints but the newest two and the best, and whatever was left unfinished."""
    paths = _by_step(folder)
    keep = {*paths[:NUM_KEPT], _best(paths)}
    for path in paths:
        if path not in keep:
            files.remove_folder(path)
    files.remove_partial(folder)


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors named `optimizer.PARAMETER.ENTRY` and the plain rest.

    The parameter groups are left out: they follow from the recipe.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            key = f"optimizer.{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                rest[key] = value
    return tensors, rest


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` took; other names in `tensors` are ignored."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest.items()]:
        if match := re.fullmatch(r"optimizer\.(\d+)\.(.+)", key):
            state.setdefault(int(match[1]), {})[match[2]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def to_safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Serialize tensors; each is copied, as safetensors refuses views and shared memory."""
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(copies, metadata)


def _by_step(folder: Path) -> list[Path]:
    steps = sorted(
        (int(m[1]) for p in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", p.name))), reverse=True
    )
    return [folder / f"step-{step}" for step in steps]


def _best(paths: list[Path]) -> Path | None:
    scores = {}
    for path in paths:
        try:
            accuracy = _read_state(path).get("accuracy")
        except ValueError:
            continue  # It cannot be loaded, so it is not the best to keep; loading it warns.
        if accuracy is not None:
            scores[path] = accuracy
    # Among equals the newest, which comes first.
    return max(scores, key=lambda path: scores[path]) if scores else None


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = read_json(path / STATE_FILE)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError(f"expected a JSON object with format {FORMAT}")
        if path.name != f"step-{state['step']}" or not isinstance(state["files"], dict):
            raise ValueError("it does not describe this folder")
        if type(state.get("accuracy")) not in (int, float, type(None)):
            raise ValueError("accuracy must be a number")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path / STATE_FILE} is missing or damaged: {error}") from error
    return state
