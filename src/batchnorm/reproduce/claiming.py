"""Whose folder it is: one experiment's, with the settings that decide its numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchnorm.files import write_json
from batchnorm.reading import read_json


def science(experiment: Any) -> dict[str, object]:
    """The settings of a dataclass that decide its numbers, as JSON would hold them."""
    hidden = ("data_dir", "out", "processes")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(experiment).items()
        if name not in hidden
    }


def claim_folder(out: Path, settings: Mapping[str, object]) -> None:
    """Write ``experiment.json``, or check that the one there has the same settings.

    Args:
        out: An existing folder.
        settings: As JSON would hold them.

    Raises:
        ValueError: The folder holds an experiment with other settings, or the file cannot be read.
    """
    path = out / "experiment.json"
    if not path.exists():
        write_json(path, settings)
        return
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("expected an object")
    except ValueError as error:
        raise ValueError(
            f"{path} is not readable ({error}): give another --out, or delete the folder"
        ) from None
    differ = [name for name, value in settings.items() if found.get(name) != value]
    if differ:
        asked = ", ".join(f"{name} {found.get(name)!r} there, {settings[name]!r} asked" for name in differ)
        raise ValueError(f"{out} holds an experiment with other settings ({asked}): give another --out")
