"""What a benchmark leaves: a file with the machine's description, a table, a picture."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from batchnorm.files import write_bytes
from batchnorm.reading import read_json
from batchnorm.report import Curve, CurveChart, draw
from batchnorm.train.run import environment


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def occasions(path: Path) -> list[Any]:
    """What a results file holds; nothing if there is none.

    Raises:
        ValueError: The file holds something else.
    """
    if not path.exists():
        return []
    try:
        return list(read_json(path)["occasions"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of benchmark results ({error}): give another --out") from None


def append(path: Path, kind: str, results: Any, **settings: Any) -> None:
    """Add one occasion to a results file; earlier ones stay.

    Args:
        path: Made if absent.
        kind: Of benchmark.
        results: Numbers, as the benchmark gives them.
        settings: What the benchmark was told.

    Raises:
        ValueError: The file holds something else.
    """
    occasion = {
        "kind": kind,
        "when": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "settings": settings,
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # A line each: tables of numbers, one to a line, would fill a screen for every case.
    lines = ",\n".join(json.dumps(o, ensure_ascii=False) for o in (*occasions(path), occasion))
    write_bytes(path, f'{{"occasions": [\n{lines}\n]}}\n'.encode())


def default_path(kind: str) -> Path:
    """``benchmarks/results/KIND-PROCESSOR.json`` below the current folder."""
    found = machine()
    name = found["device"] if found["device"] != "cpu" else found["cpu"]
    tidy = re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
    return Path("benchmarks") / "results" / f"{kind}-{tidy}.json"


def picture(rows: Sequence[Mapping[str, Any]], path: Path, *, rival: str = "eager, in place") -> Path:
    """Draw the speed-up over ``rival`` against the size of the tensor, a curve for each kind of case.

    Args:
        rows: As `kernels.measure` gives them.
        path: Of the PNG file.
        rival: A contender.

    Raises:
        ValueError: No case has right numbers.
        OSError: The file cannot be written.
    """
    width = {"float32": 4, "bfloat16": 2, "float16": 2}
    points: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if rival in row["speed_up"]:
            mebibytes = math.prod(row["shape"]) * width[row["dtype"]] / 2**20
            points[f"{row['dtype']}, {row['layout']}, {row['fusion']}"].append(
                (mebibytes, row["speed_up"][rival])
            )
    colours = ("#2b83d6", "#9cc7ef", "#e0701f", "#f3b98d", "#2e9d68", "#a5d8bf", "#b65fc4", "#dfb6e6")
    curves = []
    for i, (name, found) in enumerate(points.items()):
        sizes, ratios = zip(*sorted(found), strict=True)
        curves.append(Curve(name, sizes, ratios, colour=colours[i % 8]))
    chart = CurveChart(
        "BN (+ addition) + ReLU, forward and backward",
        "size of the input (MiB)",
        f"speed-up over {rival}",
        curves,
        log_x=True,
        reference=("as fast", 1.0),
    )
    return draw(chart, path, size=(9, 4.6))


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Geometric means of speed-ups over the layers of each network, weighted by how often they occur.

    Returns:
        By group (network, dtype, layout, fusion): mean and smallest speed-up against each rival,
        shares of the floor, and the number of cases whose numbers were wrong.
    """
    found: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[f"{row['network']}, {row['dtype']}, {row['layout']}, {row['fusion']}"].append(row)
    return {name: _group(members) for name, members in found.items()}


def _group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    right = [row for row in rows if row["right"]]
    rivals = list(right[0]["speed_up"]) if right else []
    return {
        "cases": len(rows),
        "wrong": len(rows) - len(right),
        "speed_up": {
            rival: _geometric_mean([(r["speed_up"][rival], r["count"]) for r in right]) for rival in rivals
        },
        "smallest": {rival: min(r["speed_up"][rival] for r in right) for rival in rivals},
        "floor_share": {
            kind: _geometric_mean([(row["floor_share"][kind], row["count"]) for row in rows])
            for kind in ("fresh", "reused", "kernel, reused")
        },
    }


def _geometric_mean(values: Sequence[tuple[float, int]]) -> float:
    weight = sum(count for _, count in values)
    return round(math.exp(sum(count * math.log(value) for value, count in values) / weight), 3)
