"""`batchnorm fold`: a saved model without its normalizations."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from batchnorm import files
from batchnorm.cli.batches import InputOptions, opened
from batchnorm.cli.saved import Saved, call, check_ending, save_weights
from batchnorm.deploy.gate import Problem, problems_of
from batchnorm.surgery import fold

DESCRIPTION = """\
Take the batch normalizations of a saved model into the convolutions and linear layers before them, and
write the new state dict. Every fold is proved, every refusal has its reason.

Examples:
  batchnorm fold runs/bn --out folded.safetensors
  batchnorm fold mymodels:resnet --weights best.pt --input 3 224 224 --out folded.pt
  batchnorm fold mymodels:two_inputs --weights best.pt --example mymodels:example --out folded.pt

What a folded state dict fits is the folded model. Commands of batchnorm know how to read it
(batchnorm export mymodels:resnet --weights folded.safetensors …), and so does your code:
  model, _ = bn.fold(resnet().eval(), example); model.load_state_dict(…)
For a file that needs none of your code: batchnorm export MODEL --fold.
"""


@dataclass(frozen=True, kw_only=True)
class FoldArguments(InputOptions):
    """What `batchnorm fold` is told."""

    model: Annotated[str, tyro.conf.Positional]
    """A run's folder, a recipe's name, or module:factory."""
    out: Path
    """The new state dict: NAME.safetensors or NAME.pt."""
    input: tuple[int, ...] = ()
    """Shape of one input without the batch, such as 3 224 224; by default that of the data."""
    example: str | None = None
    """module:function that returns an example: a tensor, or a tuple of arguments."""
    force: bool = False
    """Replace what stands at --out."""


def run(argv: list[str]) -> None:
    """Parse `argv`, fold, print the proof, and write the weights."""
    arguments = tyro.cli(FoldArguments, prog="batchnorm fold", description=DESCRIPTION, args=argv)
    check_ending(arguments.out)
    files.check_free(arguments.out, force=arguments.force)
    saved, batches = opened(arguments.model, arguments)
    example = example_of(saved, batches, arguments.input, arguments.example)
    if problems := [*problems_of(saved.model), *unsettled(saved)]:
        raise ValueError("not folded, nothing was written:\n" + "\n".join(f"  {p}" for p in problems))
    model, report = fold(saved.model, example)
    if not report.changes:
        raise ValueError(f"nothing could be folded, nothing was written.\n{report}")
    num_bytes = save_weights(model, arguments.out, force=arguments.force, folded_with=example)
    sys.stdout.write(f"{report}\n{arguments.out}: {num_bytes:,} bytes\n")


def example_of(
    saved: Saved, batches: Iterable[Any] | None, shape: tuple[int, ...], named: str | None
) -> tuple[Any, ...]:
    """Positional arguments to run a model on: what was named, or a batch of its data, or noise.

    Raises:
        ValueError: Nothing says what the model takes, or the function returns something else.
    """
    if named is not None:
        found = call(named)
        found = (found,) if isinstance(found, Tensor) else found
        if not isinstance(found, tuple) or not all(isinstance(t, Tensor) for t in found):
            raise ValueError(
                f"{named} must return a tensor or a tuple of tensors, got {type(found).__name__}"
            )
        return found
    if shape:
        return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),)
    if batches is not None:
        batch = next(iter(batches), None)
        x = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if isinstance(x, Tensor) and len(x):
            # Enough to see that rows do not mix, and quick.
            return (x[:4].clone(),)
    raise ValueError(
        "an example is needed: --input with the shape of one input, such as --input 3 224 224, --data, or "
        "--example module:function"
    )


def unsettled(saved: Saved) -> list[Problem]:
    """What the file says against the model's statistics."""
    if not saved.averaged:
        return []
    return [
        Problem(
            "averaged-weights",
            ("",),
            "the file is of an AveragedModel (it has n_averaged), whose statistics belong to other weights",
            "batchnorm recalibrate first, and take the file that it writes",
        )
    ]
