"""``batchnorm bench``: figures beside the rivals', with the numbers checked first."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from batchnorm.bench import adapt, clusters, fold, kinds, memory, ranks, recurrent, step, watch, whitening
from batchnorm.bench.networks import NETWORKS, Network
from batchnorm.bench.results import append, default_path, occasions, picture
from batchnorm.bench.shapes import SMALL_AND_ODD, inception_shapes, resnet50_shapes
from batchnorm.bench.timing import MEMORY, MemorySetting, process
from batchnorm.bench.zoo import Name
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


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every benchmark is told."""

    threads: int = 0
    """PyTorch's threads on the CPU; 0 leaves its own choice."""
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
    memory: tuple[MemorySetting, ...] = MEMORY
    """Where the CPU's memory comes from: the C library as it is, huge pages (THP_MEM_ALLOC_ENABLE),
    or freed memory kept for reuse, as `accelerate` has it. Each in a process of its own."""
    compiled: bool = True
    """Let torch.compile take part: seconds of compilation for each case."""


@dataclass(frozen=True, kw_only=True)
class Step(Common):
    """A training step of BN-Inception: eager, at its best, accelerated, and with BN taken out."""

    batch: int = 32
    """Images."""
    network: step.Network = "inception"
    """BN-Inception at 224×224 pixels, or at the scale of CIFAR-10."""
    rounds: int = 7
    """Samples of each form."""
    compiled: bool = False
    """Let torch.compile take part, with and without accelerate: minutes of compilation."""
    memory: tuple[MemorySetting, ...] = MEMORY
    """Where the CPU's memory comes from: the C library as it is, huge pages (THP_MEM_ALLOC_ENABLE),
    or freed memory kept for reuse, as `accelerate` has it. Each in a process of its own."""


@dataclass(frozen=True, kw_only=True)
class Memory(Common):
    """What a training step of BN-Inception holds, each form in a process of its own."""

    batch: int = 32
    """Images."""
    side: int = 224
    """Pixels."""
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    """Memory format."""


@dataclass(frozen=True, kw_only=True)
class Fold(Common):
    """Inference with and without `batchnorm.fold`, eager and compiled, of networks of several families."""

    networks: tuple[Name, ...] = ("cifar10", "resnet", "densenet", "mobilenet", "unet", "1d", "3d")
    """Which; "inception" is BN-Inception at 224×224 pixels, "cifar10" the same at the scale of CIFAR-10."""
    batches: tuple[int, ...] = (1, 32)
    """Images at a time."""
    rounds: int = 9
    """Samples of each form."""
    compiled: bool = True
    """Let torch.compile take part, with and without fold: minutes of compilation."""


@dataclass(frozen=True, kw_only=True)
class Loader(Common):
    """Random crops of JPEG files on one core: training's own loader beside a plain PyTorch data set."""

    data: Path
    """Folder of images: CLASS/IMAGE or train/CLASS/IMAGE. Photographs: nothing else is like them."""
    size: int = 224
    """Side of the crops, pixels."""
    batch: int = 32
    """Images."""
    images: int = 320
    """Of a sample."""
    rounds: int = 9
    """Samples of each contender."""
    threads: int = 1
    """PyTorch's threads; decoding has one."""


@dataclass(frozen=True, kw_only=True)
class Watch(Common):
    """Training with a recorder at its defaults beside the same training without, one step of each in turn."""

    networks: tuple[Network, ...] = NETWORKS
    """The paper's first network, BN-Inception at the scale of CIFAR-10, a small residual network."""
    every: int = 100
    """Steps from one record to the next; 100 is the recorder's default."""
    seconds: float = 60.0
    """For each network; at least three records."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Folded, exported to ONNX, and run in onnxruntime on the test digits: answers and speed."""

    networks: tuple[Literal["mlp", "inception"], ...] = ("mlp", "inception")
    """That of section 4.1, and BN-Inception at the scale of CIFAR-10."""
    run: Path | None = None
    """Folder of a trained run of the (one) network named; by default initial weights."""
    batch: int = 32
    """Images of a timed call; one by one they are timed, too."""
    images: int = 0
    """Test digits whose answers are compared; 0 for all."""
    rounds: int = 9
    """Samples of each contender."""
    threads: int = 1
    """Of PyTorch and of onnxruntime."""


@dataclass(frozen=True, kw_only=True)
class Kinds(Common):
    """Ghosts, a loop over them, renormalization and torch.nn's layer beside the plain one, in training."""

    shapes: tuple[tuple[int, int, int, int], ...] = kinds.SHAPES
    """Inputs, N C H W for each, float32."""
    ghost_size: int = 32
    """Examples in a virtual batch."""
    layouts: tuple[Literal["contiguous", "channels_last"], ...] = ("contiguous", "channels_last")
    """Memory formats."""
    rounds: int = 21
    """Samples of each contender."""
    memory: tuple[MemorySetting, ...] = ("default", "kept")
    """Where the CPU's memory comes from: the C library as it is, huge pages (THP_MEM_ALLOC_ENABLE),
    or freed memory kept for reuse, as `accelerate` has it. Each in a process of its own."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Whitening(Common):
    """Groups of channels whitened by Newton's iteration and by eigenvectors, beside the plain layer."""

    channels: tuple[int, ...] = whitening.CHANNELS
    """Of the inputs; multiples of the groups."""
    groups: tuple[int, ...] = whitening.GROUPS
    """Channels that are whitened together."""
    batch: int = 32
    """Images."""
    side: int = 16
    """Pixels."""
    iterations: int = 5
    """Of Newton's method."""
    rounds: int = 15
    """Samples of each contender."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Adapt(Common):
    """Adaptation by each method, and inference with an alarm, beside plain inference on the same batches."""

    networks: tuple[adapt.Network, ...] = adapt.NETWORKS
    """BN-Inception at the scale of CIFAR-10, a small residual network, that of reproduce adaptation."""
    batch: int = 128
    """Images in a batch."""
    batches: int = 16
    """How many are adapted on."""
    rounds: int = 9
    """Samples of each contender."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Recurrent(Common):
    """Forward and backward of batch-normalized LSTM and GRU layers, torch's, and a loop over cells."""

    cases: tuple[recurrent.Case, ...] = recurrent.CASES
    """Sequences of 28 rows, of 196 pixels, and of 50 steps with 256 hidden units."""
    rounds: int = 9
    """Samples of each contender."""
    threads: int = 1
    """PyTorch's threads; 0 leaves its own choice."""


@dataclass(frozen=True, kw_only=True)
class Ranks(Common):
    """Training steps of several gloo processes on this machine: local and synced BN beside torch.nn's."""

    networks: tuple[Network, ...] = ("resnet", "cifar10")
    """A small residual network, BN-Inception at the scale of CIFAR-10; also mlp."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of processes, 1 among them."""
    rounds: int = 9
    """Samples of each form."""
    steps: int = 3
    """Training steps of a sample."""
    threads: int = 1
    """PyTorch's threads in each process."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Step times of 1 to 1,024 GPUs by the model of docs/scaling.md. No GPU has confirmed them."""

    network: Literal["inception", "resnet50"] = "inception"
    """BN-Inception or ResNet-50, 224×224."""
    gpu: Literal["p100", "a100", "h100"] = "a100"
    """Nodes of 8: P100 and Ethernet, A100 or H100 and InfiniBand."""
    batch: int = 32
    """Images of a GPU."""
    group_size: int = 8
    """GPUs of a subgroup; a power of 2."""


KINDS: dict[str, type[Common | Scaling]] = {
    "kernels": Kernels,
    "step": Step,
    "memory": Memory,
    "kinds": Kinds,
    "whitening": Whitening,
    "fold": Fold,
    "loader": Loader,
    "watch": Watch,
    "export": Export,
    "adapt": Adapt,
    "recurrent": Recurrent,
    "ranks": Ranks,
    "scaling": Scaling,
}


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
        with process("default", options.threads) as fresh:
            found = fresh.submit(fold.measure, network=network, **arguments).result()
        append(path, "fold", found, threads=options.threads)
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


def _watch(options: Any, path: Path, console: Console) -> None:
    with Console(stderr=True).status("watch") as status:
        found = watch.measure(
            networks=options.networks,
            every=options.every,
            seconds=options.seconds,
            threads=options.threads,
            progress=status.update,
        )
    append(path, "watch", found, threads=options.threads, every=options.every, seconds=options.seconds)
    for table in TABLES["watch"](found):
        console.print(table)


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


def _whitening(options: Any, path: Path, console: Console) -> None:
    names = ("channels", "groups", "batch", "side", "iterations", "rounds", "threads")
    with Console(stderr=True).status("whitening") as status:
        found = whitening.measure(**{n: getattr(options, n) for n in names}, progress=status.update)
    append(path, "whitening", found, threads=options.threads, rounds=options.rounds)
    for table in TABLES["whitening"](found):
        console.print(table)


def _kinds(options: Any, path: Path, console: Console) -> None:
    names = ("shapes", "ghost_size", "layouts", "memory", "rounds", "threads")
    with Console(stderr=True).status("kinds") as status:
        found = kinds.measure(**{n: getattr(options, n) for n in names}, progress=status.update)
    append(path, "kinds", found, threads=options.threads, rounds=options.rounds)
    for table in TABLES["kinds"](found):
        console.print(table)


def _adapt(options: Any, path: Path, console: Console) -> None:
    arguments = {n: getattr(options, n) for n in ("networks", "batch", "batches", "rounds", "threads")}
    with Console(stderr=True).status("adapt") as status:
        found = adapt.measure(**arguments, progress=status.update)
    append(path, "adapt", found, threads=options.threads, rounds=options.rounds)
    for table in TABLES["adapt"](found):
        console.print(table)


def _recurrent(options: Any, path: Path, console: Console) -> None:
    with Console(stderr=True).status("recurrent") as status:
        found = recurrent.measure(
            cases=options.cases, rounds=options.rounds, threads=options.threads, progress=status.update
        )
    append(path, "recurrent", found, threads=options.threads, rounds=options.rounds)
    for table in TABLES["recurrent"](found):
        console.print(table)


def _ranks(options: Any, path: Path, console: Console) -> None:
    arguments = {n: getattr(options, n) for n in ("networks", "ranks", "rounds", "steps", "threads")}
    with Console(stderr=True).status("ranks") as status:
        found = ranks.measure(**arguments, progress=status.update)
    append(path, "ranks", found, threads=options.threads, rounds=options.rounds, steps=options.steps)
    for table in TABLES["ranks"](found):
        console.print(table)


MEASURES: dict[str, Callable[[Any, Path, Console], None]] = {
    "kernels": _kernels,
    "step": _step,
    "memory": _memory,
    "kinds": _kinds,
    "whitening": _whitening,
    "fold": _fold,
    "loader": _loader,
    "watch": _watch,
    "export": _export,
    "adapt": _adapt,
    "recurrent": _recurrent,
    "ranks": _ranks,
}
