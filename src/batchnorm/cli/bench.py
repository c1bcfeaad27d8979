"""``batchnorm bench``: figures beside the rivals', with the numbers checked first."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from batchnorm.bench import adapt, clusters, fold, kinds, memory, ranks, recurrent, step, watch, whitening
from batchnorm.bench.results import append, default_path, occasions, picture
from batchnorm.bench.shapes import SMALL_AND_ODD, inception_shapes, resnet50_shapes
from batchnorm.bench.timing import process
from batchnorm.cli.bench_options import KINDS, Export, Kernels, Loader, Scaling
from batchnorm.cli.bench_tables import TABLES, scaling_table

DESCRIPTION = """\
Side-by-side figures on this machine: medians over rounds in which all contenders take turns.

  kernels   BN + addition + ReLU, forward and backward, layer by layer
  step      a whole training step of BN-Inception
  memory    what a training step holds in memory
  kinds     every kind of normalization alone: ghost, renorm and others beside the plain one
  whitening what iterative whitening costs against channels and group size
  fold      inference with and without fold, eager and compiled
  loader    images a second from JPEG files, on one core
  watch     what a recorder adds to training, at its defaults
  export    an exported file in onnxruntime: its answers and its speed, beside the model's
  adapt     adaptation to another domain, and an alarm, beside plain inference
  recurrent batch-normalized LSTM and GRU layers beside torch's
  ranks     data-parallel steps of 1, 2 and 4 processes: local and synced BN, measured and by the model
  scaling   the model of step time alone, for 1 to 1,024 GPUs: arithmetic, nothing is measured

Results are added to benchmarks/results/, with the machine's description.
"""


def run(argv: list[str]) -> None:
    """Parse ``argv``, measure, print tables and add to the results file."""
    parser = argparse.ArgumentParser(
        prog="batchnorm bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help="one of the above; it has its own --help")
    kind = parser.parse_args(argv[:1]).kind
    options = tyro.cli(KINDS[kind], prog=f"batchnorm bench {kind}", args=argv[1:])
    if isinstance(options, Scaling):
        work, cluster = clusters.NETWORKS[options.network](), clusters.CLUSTERS[options.gpu]
        Console().print(scaling_table(work, cluster, batch=options.batch, group_size=options.group_size))
        return
    path = options.out or default_path(kind)
    occasions(path)  # complains now, rather than when there are results to write
    console = Console()
    MEASURES[kind](options, path, console)
    console.print(f"Written: {path}", highlight=False, soft_wrap=True)


def _kernels(options: Any, path: Path, console: Console) -> None:
    for setting in options.memory:
        with process(setting, options.threads) as fresh:
            found = fresh.submit(_measure_kernels, options).result()
        append(path, "kernels", found, memory=setting, threads=options.threads)
        if any(row["right"] for row in found):
            picture(found, path.with_name(f"{path.stem}-{setting}.png"))
        for table in TABLES["kernels"](found):
            table.title = f"{table.title}, memory {setting}"
            console.print(table)


def _measure_kernels(options: Kernels) -> list[dict[str, Any]]:
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


def _step(options: Any, path: Path, console: Console) -> None:
    with Console(stderr=True).status("step") as status:
        found = step.measure(
            batch=options.batch,
            network=options.network,
            rounds=options.rounds,
            memory=options.memory,
            compiled=options.compiled,
            threads=options.threads,
            progress=status.update,
        )
    append(path, "step", found, threads=options.threads)
    for table in TABLES["step"](found):
        console.print(table)


def _memory(options: Any, path: Path, console: Console) -> None:
    with process("default", options.threads) as fresh:
        arguments = {"batch": options.batch, "side": options.side, "layout": options.layout}
        found = fresh.submit(memory.measure, **arguments).result()
    append(path, "memory", found, threads=options.threads)
    for table in TABLES["memory"](found):
        console.print(table)


def _fold(options: Any, path: Path, console: Console) -> None:
    arguments = {n: getattr(options, n) for n in ("batches", "rounds", "compiled")}
    means = []
    for network in options.networks:
        with process(options.memory, options.threads) as fresh:
            found = fresh.submit(fold.measure, network=network, **arguments).result()
        append(path, "fold", found, memory=options.memory, threads=options.threads)
        means.append(found["geometric_mean"])
        for table in TABLES["fold"](found):
            console.print(table)
    for kind in means[0]:
        mean = statistics.geometric_mean(m[kind] for m in means)
        console.print(f"{kind}: {mean:.3f}×, geometric mean over {len(means)} networks")


def _loader(options: Any, path: Path, console: Console) -> None:
    with process("default", options.threads) as fresh:
        found = fresh.submit(_measure_loader, options).result()
    append(path, "loader", found, threads=options.threads)
    for table in TABLES["loader"](found):
        console.print(table)


def _measure_loader(options: Loader) -> dict[str, Any]:
    from batchnorm.bench import loader

    return loader.measure(
        options.data,
        size=options.size,
        batch=options.batch,
        num_images=options.images,
        rounds=options.rounds,
    )


def _export(options: Any, path: Path, console: Console) -> None:
    if options.run is not None and len(options.networks) != 1:
        raise ValueError("--run is of one network: name it with --networks")
    with process("default", options.threads) as fresh:
        found = fresh.submit(_measure_export, options).result()
    append(path, "export", found, threads=options.threads)
    for table in TABLES["export"](found):
        console.print(table)


def _measure_export(options: Export) -> list[dict[str, Any]]:
    from batchnorm.bench import export
    from batchnorm.cli.saved import open_saved

    model = None if options.run is None else open_saved(str(options.run), None, None, None).model
    return [
        export.measure(network, model, batch=options.batch, num_images=options.images, rounds=options.rounds)
        for network in options.networks
    ]


def _told(
    kind: str, bench: Any, names: Sequence[str], kept: Sequence[str] = ("threads", "rounds")
) -> Callable[[Any, Path, Console], None]:
    """What runs a benchmark that starts its own processes and tells its progress.

    Args:
        kind: Its name.
        bench: Its module.
        names: Options that ``measure`` takes.
        kept: Options that stand beside the results in the file.
    """

    def run(options: Any, path: Path, console: Console) -> None:
        arguments = {name: getattr(options, name) for name in names}
        with Console(stderr=True).status(kind) as status:
            found = bench.measure(**arguments, progress=status.update)
        append(path, kind, found, **{name: getattr(options, name) for name in kept})
        for table in TABLES[kind](found):
            console.print(table)

    return run


MEASURES: dict[str, Callable[[Any, Path, Console], None]] = {
    "kernels": _kernels,
    "step": _step,
    "memory": _memory,
    "kinds": _told("kinds", kinds, ("shapes", "ghost_size", "layouts", "memory", "rounds", "threads")),
    "whitening": _told(
        "whitening", whitening, ("channels", "groups", "batch", "side", "iterations", "rounds", "threads")
    ),
    "fold": _fold,
    "loader": _loader,
    "watch": _told(
        "watch", watch, ("networks", "every", "seconds", "threads"), ("threads", "every", "seconds")
    ),
    "export": _export,
    "adapt": _told("adapt", adapt, ("networks", "batch", "batches", "rounds", "threads")),
    "recurrent": _told("recurrent", recurrent, ("cases", "rounds", "threads")),
    "ranks": _told(
        "ranks", ranks, ("networks", "ranks", "rounds", "steps", "threads"), ("threads", "rounds", "steps")
    ),
}
