"""BN+ReLU forward and backward on one GPU: ours beside eager PyTorch and `torch.compile`.

Every layer shape of ResNet-50 and BN-Inception, batches of 32 and 128, three dtypes, both layouts, as a
user calls them: a layer, and a backward pass with a random gradient. The rivals' ReLU is in place. Before a
case is timed its numbers are judged against float64; the speed of wrong numbers is not reported. The three
take turns, in slices timed by the device's own clock; figures are medians over the turns, with quartiles.

    python benchmarks/gpu.py                                     everything: hours, most of it torch.compile
    python benchmarks/gpu.py --network ResNet-50 --batch 32 --dtype bfloat16 --layout channels_last

Results are kept by case in benchmarks/results/gpu-NAME.json, so that runs can be added to each other.
Exit status: 0, 1 if any case's numbers were wrong, 2 without a CUDA device.
"""

import argparse
import json
import math
import platform
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDOFF = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NETWORKS = ("ResNet-50", "BN-Inception")
SLICE_MS = 20.0
EPS = 1e-5


def main() -> int:
    arguments = parse()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device, and PyTorch sees none here; nothing was measured")
        return 2
    name = torch.cuda.get_device_name()
    path = RESULTS / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"
    kept = json.loads(path.read_text())["cases"] if path.exists() else {}
    rate = copy_rate()
    print(f"{name}: a copy moves {rate / 1e12:.2f} TB/s, read and written")
    wrong = 0
    for shape, count, network in wanted_shapes(arguments):
        for dtype in arguments.dtype:
            for layout in arguments.layout:
                key = f"{network} {'x'.join(map(str, shape))} {dtype} {layout}"
                case = measure(shape, DTYPES[dtype], LAYOUTS[layout], rate, arguments)
                kept[key] = {"network": network, "count": count, "dtype": dtype, "layout": layout, **case}
                wrong += "wrong" in case
                print(f"{key:55}  {line(case)}", flush=True)
                write(path, name, rate, kept)
    summarize(kept)
    return 1 if wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--turns", type=int, default=9, help="slices of each rival")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args()


def wanted_shapes(arguments: argparse.Namespace) -> list[tuple[tuple[int, ...], int, str]]:
    from batchnorm.bench.shapes import inception_shapes, resnet50_shapes

    shapes = []
    for batch in arguments.batch:
        for network, of in (("ResNet-50", resnet50_shapes), ("BN-Inception", inception_shapes)):
            if network in arguments.network:
                shapes += [(shape.full, shape.count, network) for shape in of(batch)]
    return shapes


def copy_rate() -> float:
    """Bytes per second, read and written, of a copy far larger than the cache."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    seconds = statistics.median(in_turns({"copy": lambda: target.copy_(source)}, 9)["copy"])
    return 2 * source.nbytes / seconds


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, rate: float, arguments: Any
) -> dict[str, Any]:
    """One case: judged, then timed. ``share`` is of the copy rate, for the passes that are needed."""
    from batchnorm import BatchNorm2d

    torch.manual_seed(0)
    x = (torch.randn(shape, device="cuda") * 2 + 1).to(dtype).to(memory_format=layout).requires_grad_()
    dy = torch.randn(shape, device="cuda").to(dtype).to(memory_format=layout)
    plain = nn.BatchNorm2d(shape[1], eps=EPS).cuda()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours = BatchNorm2d(shape[1], eps=EPS, activation="relu").cuda()
    ours.load_state_dict(plain.state_dict())

    def eager(x: Tensor) -> Tensor:
        return F.relu_(plain(x))

    rivals: dict[str, Callable[[Tensor], Tensor]] = {"ours": ours, "eager": eager}
    if not arguments.no_compile:
        torch._dynamo.reset()
        rivals["compile"] = torch.compile(eager, dynamic=False)
    fault = judge(x, dy, ours, plain)
    if fault:
        return {"wrong": fault}

    def step(f: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(x), [x, *parameters], dy)

    calls = {n: step(f, list((ours if n == "ours" else plain).parameters())) for n, f in rivals.items()}
    with _by_gpu_kernel():
        samples = in_turns(calls, arguments.turns)
    case: dict[str, Any] = {}
    for name, seconds in samples.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        case[name] = {"median_us": middle * 1e6, "quartiles_us": [low * 1e6, high * 1e6]}
    # Beyond the cache: x twice and y; x and dy twice and ∂x. Within it each second reading is free.
    passes = 8 if x.nbytes > torch.cuda.get_device_properties(0).L2_cache_size else 5
    case["passes"] = passes
    case["share"] = passes * x.nbytes / (case["ours"]["median_us"] * 1e-6) / rate
    for name in calls.keys() - {"ours"}:
        case[f"times_{name}"] = case[name]["median_us"] / case["ours"]["median_us"]
    return case


def judge(x: Tensor, dy: Tensor, ours: nn.Module, plain: nn.BatchNorm2d) -> str:
    """What is wrong with our numbers; nothing if they miss float64 by twice what eager does, and rounding."""
    wide = [t.detach().double().requires_grad_() for t in (x, plain.weight, plain.bias)]
    z = F.batch_norm(wide[0], None, None, wide[1], wide[2], True, 0.0, EPS)
    # Where ReLU bends, rounding alone decides the slope.
    dy[z.abs() < 1e-3] = 0
    y = F.relu(z)
    truth = [y.detach(), *torch.autograd.grad(y, wide, dy.double())]
    with _by_gpu_kernel():
        y = ours(x)
        mine = [y.detach(), *torch.autograd.grad(y, [x, ours.weight, ours.bias], dy)]
    y = F.relu(plain(x))
    eager = [y.detach(), *torch.autograd.grad(y, [x, plain.weight, plain.bias], dy)]
    faults = []
    for name, m, e, t in zip(("y", "dx", "dweight", "dbias"), mine, eager, truth, strict=True):
        largest = t.abs().max().item()
        missed, allowed = ((v.double() - t).abs().max().item() for v in (m, e))
        allowed = 2 * allowed + (ROUNDOFF[m.dtype] + 32 * ROUNDOFF[torch.float32]) * largest
        if not missed <= allowed:
            faults.append(f"{name} is off by {missed:.2e}, allowed {allowed:.2e}")
    return "; ".join(faults)


def _by_gpu_kernel() -> Any:
    from batchnorm.kernels import use

    return use("gpu")


def in_turns(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds a call takes, of each in turn, in slices long enough to fill the device's queue."""
    repeats = {}
    for name, call in calls.items():
        for _ in range(5):
            call()
        repeats[name] = max(5, math.ceil(SLICE_MS / max(_slice_ms(call, 5) / 5, 1e-3)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            samples[name].append(_slice_ms(call, repeats[name]) / repeats[name] / 1e3)
    return samples


def _slice_ms(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def line(case: dict[str, Any]) -> str:
    if "wrong" in case:
        return f"WRONG, not timed: {case['wrong']}"
    low, high = case["ours"]["quartiles_us"]
    text = f"{case['ours']['median_us']:8.1f} µs ({low:.1f}-{high:.1f})  {case['share']:4.0%} of copy"
    return text + "".join(f"  {case[k]:5.2f}x {k[6:]}" for k in ("times_eager", "times_compile") if k in case)


def summarize(kept: dict[str, Any]) -> None:
    """Geometric means over the layers of a network, each as often as it occurs."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for case in kept.values():
        if "wrong" not in case:
            groups.setdefault((case["network"], case["dtype"], case["layout"]), []).append(case)
    for group, cases in sorted(groups.items()):
        means = []
        for key in ("times_eager", "times_compile"):
            known = [(math.log(c[key]), c["count"]) for c in cases if key in c]
            if known:
                mean = math.exp(sum(v * n for v, n in known) / sum(n for _, n in known))
                means.append(f"{mean:.2f}x {key[6:]} (least {min(c[key] for c in cases if key in c):.2f}x)")
        beyond = [c["share"] for c in cases if c["passes"] == 8]
        if beyond:
            means.append(f"{statistics.median(beyond):.0%} of the copy rate beyond the cache")
        print(f"{' '.join(group):40}  {'  '.join(means)}")


def write(path: Path, name: str, rate: float, cases: dict[str, Any]) -> None:
    from batchnorm.files import write_json

    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"device": name, **versions, "copy_bytes_per_s": rate, "cases": cases})


if __name__ == "__main__":
    sys.exit(main())
