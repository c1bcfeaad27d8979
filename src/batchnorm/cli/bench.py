"""``batchnorm bench``: figures beside the rivals', with the numbers checked first."""

import argparse
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.bench.results import append, default_path, groups, picture
from batchnorm.bench.shapes import SMALL_AND_ODD, inception_shapes, resnet50_shapes
from batchnorm.bench.timing import HUGE_PAGES, environment

DESCRIPTION = """\
Side-by-side figures on this machine: medians over rounds in which all contenders take turns.

  kernels   BN + addition + ReLU, forward and backward, layer by layer
  step      a whole training step of BN-Inception
  memory    what a training step holds in memory

Results are added to benchmarks/results/, with the machine's description.
"""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every benchmark is told."""

    huge_pages: Literal["both", "on", "off"] = "both"
    """Whether PyTorch's allocator asks for huge pages (THP_MEM_ALLOC_ENABLE); both: two runs."""
    threads: int = 0
    """PyTorch's threads; 0 leaves its own choice."""
    out: Path | None = None
    """Results file; by default benchmarks/results/KIND-PROCESSOR.json."""


@dataclass(frozen=True, kw_only=True)
class Kernels(Common):
    """BN, addition and ReLU, forward and backward, on every layer of BN-Inception and ResNet-50."""

    networks: tuple[Literal["inception", "resnet50", "small"], ...] = ("inception", "resnet50", "small")
    """Whose layers."""
    batch: int = 32
    """Examples."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32", "bfloat16")
    """Of the activations; statistics and parameters are float32."""
    layouts: tuple[Literal["contiguous", "channels_last"], ...] = ("contiguous", "channels_last")
    """Memory formats."""
    fusions: tuple[Literal["relu", "residual"], ...] = ("relu", "residual")
    """BN + ReLU, or BN + addition + ReLU."""
    rounds: int = 9
    """Samples of each contender."""
    compiled: bool = True
    """Let torch.compile take part: seconds of compilation for each case."""


@dataclass(frozen=True, kw_only=True)
class Step(Common):
    """A training step of BN-Inception: eager, at its best, accelerated, and with BN taken out."""

    batch: int = 32
    """Images."""
    side: int = 224
    """Pixels."""
    rounds: int = 5
    """Samples of each form."""


@dataclass(frozen=True, kw_only=True)
class Memory(Common):
    """What a training step of BN-Inception holds, each form in a process of its own."""

    batch: int = 32
    """Images."""
    side: int = 224
    """Pixels."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Memory format."""


KINDS: dict[str, type[Common]] = {"kernels": Kernels, "step": Step, "memory": Memory}


def run(argv: list[str]) -> None:
    """Parse ``argv``, measure, print tables and add to the results file."""
    parser = argparse.ArgumentParser(
        prog="batchnorm bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help="one of the above; it has its own --help")
    kind = parser.parse_args(argv[:1]).kind
    options = tyro.cli(KINDS[kind], prog=f"batchnorm bench {kind}", args=argv[1:])
    console = Console()
    path = options.out or default_path(kind)
    for huge_pages in {"both": (False, True), "on": (True,), "off": (False,)}[options.huge_pages]:
        # PyTorch reads the switch at its first allocation, so each setting needs a fresh process.
        context = multiprocessing.get_context("spawn")
        with environment(**{HUGE_PAGES: str(int(huge_pages))}), ProcessPoolExecutor(1, context) as process:
            found = process.submit(measure, kind, options).result()
        append(path, kind, found, huge_pages=huge_pages)
        if kind == "kernels" and any(row["right"] for row in found):
            picture(found, path.with_name(f"{path.stem}{'-huge-pages' if huge_pages else ''}.png"))
        for table in TABLES[kind](found):
            table.title = f"{table.title}, huge pages {'on' if huge_pages else 'off'}"
            console.print(table)
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)


def measure(kind: str, options: Common) -> Any:
    """One benchmark, in this process."""
    import torch

    from batchnorm.bench import memory, step

    if options.threads:
        torch.set_num_threads(options.threads)
    if isinstance(options, Kernels):
        return _kernels(options)
    if isinstance(options, Step):
        return step.measure(batch=options.batch, side=options.side, rounds=options.rounds)
    assert isinstance(options, Memory)
    return memory.measure(batch=options.batch, side=options.side, layout=options.layout)


def _kernels(options: Kernels) -> list[dict[str, Any]]:
    from rich.progress import track

    from batchnorm.bench import kernels

    of: dict[str, Callable[[int], Any]] = {
        "inception": inception_shapes,
        "resnet50": resnet50_shapes,
        "small": lambda _: SMALL_AND_ODD,
    }
    cases = [
        kernels.Case(shape, dtype, layout, fusion)
        for network in options.networks
        for dtype in options.dtypes
        for layout in options.layouts
        for fusion in options.fusions
        for shape in of[network](options.batch)
        if len(shape.full) == 4 or layout == "contiguous"
    ]
    console = Console(stderr=True)
    shown = track(cases, "kernels", console=console, disable=not console.is_terminal)
    return [kernels.measure(case, rounds=options.rounds, compiled=options.compiled) for case in shown]


def _kernel_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    found = groups(rows)
    rivals = list(next(iter(found.values()))["speed_up"])
    table = Table(
        "layers of", "cases", *(f"× {rival}" for rival in rivals), "of the floor", title="BN kernels"
    )
    for name, group in found.items():
        ratios = [
            f"{group['speed_up'][rival]:.2f} (≥ {group['smallest'][rival]:.2f})"
            if rival in group["speed_up"]
            else "–"
            for rival in rivals
        ]
        share = f"{group['floor_share']['reused']:.0%}"
        wrong = f", {group['wrong']} WRONG" if group["wrong"] else ""
        table.add_row(name, f"{group['cases']}{wrong}", *ratios, share)
    table.caption = (
        "speed-up of forward + backward: geometric mean over layers (smallest); floor: reused memory"
    )
    return [table]


def _step_tables(found: Mapping[str, Any]) -> list[Table]:
    times = Table("form", "seconds a step", "quartiles", title=found["network"])
    for name, (median, low, high) in found["seconds"].items():
        times.add_row(name, f"{median:.3f}", f"{low:.3f}–{high:.3f}")
    ratios = Table("figure", "", title="Ratios")
    for name, value in found["ratios"].items():
        ratios.add_row(name, f"{value:.2f}")
    return [times, ratios]


def _memory_tables(found: Mapping[str, Any]) -> list[Table]:
    table = Table("form", "held for backward", "peak of the step", title=found["network"])
    for name, figures in found["bytes"].items():
        relative = found["of_eager_in_place"][name]
        table.add_row(name, *(f"{figures[w] / 2**20:,.0f} MiB ({relative[w]:.0%})" for w in ("held", "peak")))
    return [table]


TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "kernels": _kernel_tables,
    "step": _step_tables,
    "memory": _memory_tables,
}
