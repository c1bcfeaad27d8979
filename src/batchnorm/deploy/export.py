"""A trained model to a file, through a gate before and a comparison after."""

import json
import math
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from batchnorm import files
from batchnorm.deploy import onnx_file
from batchnorm.deploy.compare import Comparison, Runner, batch_size_of, compare, resized
from batchnorm.deploy.gate import Problem, check, check_program
from batchnorm.deploy.program import program_of, program_runner, without_traces, write_program
from batchnorm.statistics.choose import unwrapped
from batchnorm.surgery.models import as_args, check_example, check_model, copied

FORMATS = ("onnx", "pt2")


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how closely it agrees with the model; ``print`` shows it.

    Attributes:
        path: The file.
        format: "onnx" or "pt2".
        num_bytes: Its size.
        inputs: Shape of each input; "batch" stands for any size.
        comparisons: The file run again, on the example and on other batch sizes.
        num_norms: Batch normalizations that the model still has: 0 after `batchnorm.fold`.
        allowed: Problems of the model that were let through.
        metadata: What the file says about itself.
    """

    path: Path
    format: str
    num_bytes: int
    inputs: tuple[tuple[int | str, ...], ...]
    comparisons: tuple[Comparison, ...]
    num_norms: int
    allowed: tuple[Problem, ...]
    metadata: Mapping[str, str]

    @property
    def largest(self) -> float:
        """The largest difference of outputs, relative to the largest output of its batch."""
        return max((c.relative for c in self.comparisons), default=0.0)

    def __str__(self) -> str:
        shapes = ", ".join("×".join(map(str, shape)) or "scalar" for shape in self.inputs)
        lines = [f"{self.path}: {self.format}, {self.num_bytes:,} bytes, input {shapes}"]
        lines += [
            f"  {c.runner}, batch of {c.batch_size}: differs by {c.absolute:.1e}, {c.relative:.1e} of the "
            f"largest output (rounding explains {c.allowed:.1e})"
            for c in self.comparisons
        ]
        if self.num_norms:
            lines.append(
                f"  {self.num_norms} batch normalizations are in it; bn.fold(model, example) before takes "
                "out those that follow a convolution or linear layer"
            )
        lines += [f"  let through: {problem}" for problem in self.allowed]
        return "\n".join(lines)


def export(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    path: str | Path,
    *,
    format: str | None = None,
    dynamic_batch: bool = True,
    batches: Iterable[Any] | None = None,
    classes: Sequence[str] | None = None,
    normalization: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    allow: Collection[str] = (),
    force: bool = False,
) -> ExportReport:
    """Write a model to a file that onnxruntime, or PyTorch without the model's code, runs.

    Before anything is written, a gate looks for what makes inference wrong: normalizations or dropout in
    training mode (also in the graph, of forwards that call functions), layers without running statistics,
    statistics that are not finite or were never updated, averaged weights whose statistics were not
    measured. With ``batches`` the statistics are held against data, too.

    The file is then written beside its place and run: by onnxruntime, or reloaded by ``torch.export``, on
    the example and, with ``dynamic_batch``, on batches of 1, 3 and twice its size. Only if it
    agrees with the model does it get its name. It holds no paths of this machine.

    Args:
        model: In evaluation mode; not changed. Wrappers for data parallelism and `AveragedModel` are looked
            through.
        example: An input tensor, or a tuple of positional arguments.
        path: Where the file goes, in a folder that exists.
        format: "onnx" or "pt2" (`torch.export`); by default by the ending of ``path``.
        dynamic_batch: The first dimension of every tensor that has as many rows as the first one may
            have any size. Otherwise all shapes are those of the example.
        batches: Data of the kind to serve, see `batchnorm.diagnose`.
        classes: Names of the outputs, kept in the file.
        normalization: How inputs are prepared, as JSON, such as
            ``{"range": [0, 1], "mean": [0.5], "std": [0.25]}``; kept in the file.
        provenance: Where the model comes from, as JSON, beside the versions, which are always kept.
        allow: Problems to let through: "never-updated", "averaged-weights".
        force: Replace what stands at ``path``.

    Returns:
        The report, with the largest difference of each run.

    Raises:
        ValueError: The gate found something (each problem with its layers and cure), the forward cannot be
            captured, ONNX lacks an operator, or the file computes something else. Nothing is left at
            ``path``, and what stood there still does.
        TypeError: ``model`` or ``example`` has the wrong type.
        FileExistsError: ``path`` exists, and ``force`` is false.
        ImportError: ONNX, and the extra ``batchnorm[export]`` is not installed.
        OSError: The file cannot be written.
    """
    path = Path(path)
    kind = _format(path, format)
    files.check_free(path, force=force)
    if kind == "onnx":
        onnx_file.check_installed()
    args = as_args(example)
    let_through = check(_checked(model), batches, allow)
    network = unwrapped(model)
    metadata = _metadata(network, classes, normalization, provenance)
    # Run where the file will be run, whatever device the model is on.
    network = copied(network).cpu().eval()
    args = tree_map(lambda a: a.detach().cpu() if isinstance(a, Tensor) else a, args)
    check_example(network, args)
    if dynamic_batch and not batch_size_of(args):
        raise ValueError("dynamic_batch needs an example whose first dimension is the batch, of 1 or more")
    program = program_of(network, args, dynamic_batch=dynamic_batch)
    check_program(program)
    program = without_traces(program)
    content = write_program(program, metadata) if kind == "pt2" else onnx_file.write_onnx(program, metadata)
    with files.beside(path, content, force=force) as partial:
        run = program_runner(partial) if kind == "pt2" else onnx_file.onnx_runner(partial)
        name = "torch.export" if kind == "pt2" else "onnxruntime"
        comparisons = _compared(network, name, run, args, dynamic_batch=dynamic_batch)
    return ExportReport(
        path,
        kind,
        len(content),
        _shapes(args, dynamic_batch=dynamic_batch),
        comparisons,
        sum(isinstance(m, _BatchNorm) for m in network.modules()),
        tuple(let_through),
        metadata,
    )


def _checked(model: nn.Module) -> nn.Module:
    check_model(unwrapped(model), "export")
    return model


def _format(path: Path, given: str | None) -> str:
    kind = path.suffix.removeprefix(".") if given is None else given
    if kind not in FORMATS:
        if given is None:
            raise ValueError(
                f"{path.name!r} ends in neither .onnx nor .pt2: name the file so, or give format="
            )
        raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {given!r}")
    return kind


def _compared(
    network: nn.Module, name: str, run: Runner, args: tuple[Any, ...], *, dynamic_batch: bool
) -> tuple[Comparison, ...]:
    size = batch_size_of(args)
    cases = [(size, args)]
    if dynamic_batch and size:
        cases += [(other, resized(args, other)) for other in (1, 3, 2 * size) if other != size]
    found = tuple(compare(network, name, run, given, rows) for rows, given in cases)
    worst = max(found, key=lambda c: c.relative if math.isfinite(c.relative) else math.inf)
    off = [c for c in found if not c.agrees]
    if off:
        raise ValueError(
            f"the file does not compute what the model does: {name} differs by {worst.absolute:.1e} "
            f"({worst.relative:.1e} of the largest output, rounding explains {worst.allowed:.1e}) on a batch "
            f"of {worst.batch_size}. Nothing was left at its place; a forward that branches on values, keeps "
            "numbers of the example, or draws random numbers does this"
        )
    return found


def _shapes(args: tuple[Any, ...], *, dynamic_batch: bool) -> tuple[tuple[int | str, ...], ...]:
    size = batch_size_of(args)
    return tuple(
        ("batch", *t.shape[1:]) if dynamic_batch and t.dim() and len(t) == size else tuple(t.shape)
        for t in tree_leaves(args)
        if isinstance(t, Tensor)
    )


def _metadata(
    network: nn.Module,
    classes: Sequence[str] | None,
    normalization: Mapping[str, Any] | None,
    provenance: Mapping[str, Any] | None,
) -> dict[str, str]:
    versions = {name: version(name) for name in ("batchnorm", "torch")}
    about = {"python": platform.python_version(), **versions, "model": type(network).__qualname__}
    found: dict[str, Any] = {"provenance": {**about, **(provenance or {})}}
    if classes is not None:
        found["classes"] = list(classes)
    if normalization is not None:
        found["normalization"] = dict(normalization)
    try:
        return {name: json.dumps(value, allow_nan=False) for name, value in found.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"classes, normalization and provenance are kept as JSON, which these are not: {error}"
        ) from error
