"""A model as one graph of PyTorch's operators: the first step of every format, and the format .pt2."""

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm.deploy.compare import Runner, batch_size_of, resized

METADATA_FILE = "metadata.json"
"""Name under which a .pt2 file holds the metadata, among its extra files."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that exporters give about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def program_of(model: nn.Module, args: tuple[Any, ...], *, dynamic_batch: bool) -> Any:
    """The exported program of a model in evaluation mode.

    Args:
        model: On the CPU.
        args: Example.
        dynamic_batch: Whether it shall take batches of any size.

    Raises:
        ValueError: The forward cannot be captured in one graph, or only for this batch size.
    """
    shapes = None
    if dynamic_batch:
        # A batch of one would be taken for a constant.
        args = resized(args, max(2, batch_size_of(args) or 0))
        size, batch = batch_size_of(args), torch.export.Dim("batch")

        def dims(value: Any) -> Any:
            is_batched = isinstance(value, Tensor) and value.dim() and len(value) == size
            return {0: batch} if is_batched else None

        shapes = tree_map(dims, args)
    try:
        with quiet(), torch.no_grad():
            return torch.export.export(model, args, dynamic_shapes=shapes)
    except Exception as error:  # the user's forward may raise anything, and the tracer has many kinds
        reason = str(error).strip().partition("\n\n")[0]
        if dynamic_batch and ("onstraint" in reason or "specializ" in reason):
            raise ValueError(
                "the model cannot be exported for batches of any size, as its forward depends on the "
                f"size: {reason}. Give dynamic_batch=False (--no-dynamic-batch) to fix it at that of the "
                "example, or take sizes from x.shape in the forward"
            ) from error
        raise ValueError(
            "the model's forward cannot be captured as one graph (torch.export): "
            f"{type(error).__name__}: {reason}"
        ) from error


def without_traces(program: Any) -> Any:
    """The program without the lines of source that it came from, which name folders of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def write_program(program: Any, metadata: Mapping[str, str]) -> bytes:
    """The content of a .pt2 file."""
    whole = io.BytesIO()
    with quiet():
        extra = {METADATA_FILE: json.dumps(dict(metadata), indent=2)}
        torch.export.save(program, whole, extra_files=extra)
    return whole.getvalue()


def program_runner(path: Path) -> Runner:
    """What runs a .pt2 file, reloaded from the disk."""
    with quiet(), open(path, "rb") as file:
        module = torch.export.load(file).module()

    def run(args: tuple[Any, ...]) -> list[Tensor]:
        with torch.no_grad():
            return [leaf for leaf in tree_leaves(module(*args)) if isinstance(leaf, Tensor)]

    return run
