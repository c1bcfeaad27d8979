"""``batchnorm bench``: figures beside the rivals', with the numbers checked first."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from batchnorm.bench import fold, memory, step, watch
from batchnorm.bench.results import append, default_path, groups, occasions, picture
from batchnorm.bench.shapes import SMALL_AND_ODD, inception_shapes, resnet50_shapes
from batchnorm.bench.timing import MEMORY, MemorySetting, process

DESCRIPTION = """\
Side-by-side figures on this machine: medians over rounds in which all contenders take turns.

  kernels   BN + addition + ReLU, forward and backward, layer by layer
  step      a whole training step of BN-Inception
  memory    what a training step holds in memory
  fold      inference with and without fold, eager and compiled
  loader    images a second from JPEG files, on one core
  watch     what a recorder adds to training, at its defaults
  export    an exported file in onnxruntime: its answers and its speed, beside the model's

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
    """Inference of BN-Inception with and without `batchnorm.fold`, eager and compiled."""

    network: step.Network = "inception"
    """BN-Inception at 224×224 pixels, or at the scale of CIFAR-10."""
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

    networks: tuple[watch.Network, ...] = watch.NETWORKS
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


KINDS: dict[str, type[Common]] = {
    "kernels": Kernels,
    "step": Step,
    "memory": Memory,
    "fold": Fold,
    "loader": Loader,
    "watch": Watch,
    "export": Export,
}


def run(argv: list[str]) -> None:
    """Parse ``argv``, measure, print tables and add to the results file."""
    parser = argparse.ArgumentParser(
        prog="batchnorm bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help="one of the above; it has its own --help")
    kind = parser.parse_args(argv[:1]).kind
    options = tyro.cli(KINDS[kind], prog=f"batchnorm bench {kind}", args=argv[1:])
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
    arguments = {n: getattr(options, n) for n in ("network", "batches", "rounds", "compiled")}
    with process("default", options.threads) as fresh:
        found = fresh.submit(fold.measure, **arguments).result()
    append(path, "fold", found, threads=options.threads)
    for table in TABLES["fold"](found):
        console.print(table)


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


MEASURES: dict[str, Callable[[Any, Path, Console], None]] = {
    "kernels": _kernels,
    "step": _step,
    "memory": _memory,
    "fold": _fold,
    "loader": _loader,
    "watch": _watch,
    "export": _export,
}


def _kernel_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    found = groups(rows)
    rivals = max((list(group["speed_up"]) for group in found.values()), key=len)
    floors = ("floor / layer", "floor / kernel")
    table = Table("layers of", "cases", *(f"× {rival}" for rival in rivals), *floors, title="BN kernels")
    for name, group in found.items():
        ratios = [
            f"{group['speed_up'][rival]:.2f} (≥ {group['smallest'][rival]:.2f})"
            if rival in group["speed_up"]
            else "–"
            for rival in rivals
        ]
        shares = (f"{group['floor_share'][of]:.0%}" for of in ("reused", "kernel, reused"))
        wrong = f", {group['wrong']} WRONG" if group["wrong"] else ""
        table.add_row(name, f"{group['cases']}{wrong}", *ratios, *shares)
    table.caption = (
        "speed-up of forward + backward: geometric mean over layers (smallest); floor: reused memory"
    )
    return [table]


def _step_tables(found: Mapping[str, Any]) -> list[Table]:
    settings = list(found["seconds"])
    times = Table("form", *(f"memory {s}" for s in settings), title=f"{found['network']}, seconds a step")
    for form in found["seconds"][settings[0]]:
        cells = (found["seconds"][s][form] for s in settings)
        times.add_row(form, *(f"{median:.3f} ({low:.3f}–{high:.3f})" for median, low, high in cells))
    ratios = Table("against", "", title="Speed-up", caption="medians; in brackets above: quartiles")
    for name, of in found["ratios"].items():
        ratios.add_row(f"[bold]{name}", "")
        for rival, value in of.items():
            ratios.add_row(rival, f"{value:.2f}")
    return [times, ratios]


def _memory_tables(found: Mapping[str, Any]) -> list[Table]:
    table = Table("form", "held for backward", "peak of the step", title=found["network"])
    for name, figures in found["bytes"].items():
        relative = found["of_eager_in_place"][name]
        table.add_row(name, *(f"{figures[w] / 2**20:,.0f} MiB ({relative[w]:.0%})" for w in ("held", "peak")))
    return [table]


def _fold_tables(found: Mapping[str, Any]) -> list[Table]:
    batches = list(found["milliseconds"])
    times = Table("form", *batches, title=f"{found['network']}, milliseconds a forward")
    for form in found["milliseconds"][batches[0]]:
        cells = (found["milliseconds"][batch][form] for batch in batches)
        times.add_row(form, *(f"{median:.2f} ({low:.2f}–{high:.2f})" for median, low, high in cells))
    times.caption = (
        f"medians; in brackets: quartiles; {found['folded']} normalizations folded, {found['left']} left; "
        f"outputs differ by {found['difference']:.1e}"
    )
    ratios = Table("fold against", *batches, "geometric mean", title="Speed-up")
    for kind, mean in found["geometric_mean"].items():
        ratios.add_row(kind, *(f"{found['speed_up'][b][kind]:.2f}" for b in batches), f"{mean:.2f}")
    return [times, ratios]


def _loader_tables(found: Mapping[str, Any]) -> list[Table]:
    rates = Table("loader", "images/s", title=found["images"], caption="on one core")
    for name, (median, low, high) in found["images_per_s"].items():
        rates.add_row(name, f"{median:.0f} ({low:.0f}–{high:.0f})")
    ratios = Table("", "", title="Speed-up", show_header=False)
    for name, ratio in found["ratios"].items():
        ratios.add_row(name, f"{ratio:.2f}")
    ratios.caption = (
        "medians; in brackets above: quartiles; "
        f"pixels differ by {found['difference_levels']:.2f} of 255 levels"
    )
    return [rates, ratios]


def _watch_tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    table = Table(
        "network", "layers", "step", "added", "added (CPU)", "between records", "a record", title="Watching"
    )
    for row in found:
        table.add_row(
            row["network"],
            str(row["layers"]),
            f"{row['step_s'][0] * 1000:.2f} ms",
            *(_quartiles(row[part], "{:.1%}") for part in ("added", "added_cpu", "between")),
            _quartiles(row["record"], "{:.1f}") + " steps",
        )
    table.caption = "medians over periods from record to record; in brackets: quartiles"
    return [table]


def _quartiles(values: Sequence[float], form: str) -> str:
    median, low, high = map(form.format, values)
    return f"{median} ({low} to {high})"


def _export_tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    answers = Table("network", "same class", "largest difference", "largest logit", title="Answers")
    speed = Table("network", "images", "eager", "folded, eager", "onnxruntime", title="Milliseconds a call")
    for row in found:
        same = f"{row['same_class']} of {row['images']}"
        logits = (f"{row['largest_difference']:.1e}", f"{row['largest_logit']:.3g}")
        answers.add_row(row["network"], same, *logits)
        for size, ms in row["ms"].items():
            speed.add_row(row["network"], str(size), *(f"{value:.3f}" for value in ms.values()))
    return [answers, speed]


TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "kernels": _kernel_tables,
    "step": _step_tables,
    "memory": _memory_tables,
    "fold": _fold_tables,
    "loader": _loader_tables,
    "watch": _watch_tables,
    "export": _export_tables,
}
