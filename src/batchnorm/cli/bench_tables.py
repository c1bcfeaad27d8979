"""Tables of ``batchnorm bench``, from the results that it keeps."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from batchnorm.bench import clusters
from batchnorm.bench.results import groups
from batchnorm.bench.scaling import Cluster, Work


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


def _whitening_tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    return [
        _over_plain(row, f"whitening, {_shape(row)}, {row['iterations']} iterations, forward and backward")
        for row in found
    ]


def _kinds_tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    return [
        _over_plain(
            row, f"{_shape(row)}, {row['layout']}, ghosts of {row['ghost_size']}, memory: {row['memory']}"
        )
        for row in found
    ]


def _shape(row: Mapping[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


def _over_plain(row: Mapping[str, Any], title: str) -> Table:
    table = Table("", "milliseconds", "over plain", "over plain (CPU)", title=title)
    for name, ms in row["ms"].items():
        ratios = (_quartiles(row[clock][name], "{:.2f}") for clock in ("ratio", "ratio_cpu"))
        table.add_row(name, _quartiles(ms, "{:.2f}"), *ratios)
    table.caption = "forward and backward; medians over rounds, in brackets quartiles"
    return table


def _adapt_tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    tables = []
    for network in found:
        table = Table("", "seconds", "throughput", title=network["network"])
        for name, seconds in network["seconds"].items():
            table.add_row(name, _quartiles(seconds, "{:.3f}"), f"{network['throughput'][name]:.0%}")
        table.caption = "medians; in brackets: quartiles; throughput of inference is 100 %"
        tables.append(table)
    return tables


def _recurrent_tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    tables = []
    for row in found:
        table = Table("", "ms", "ratio", title=row["case"])
        for name, seconds in row["seconds"].items():
            table.add_row(
                name, _quartiles([1000 * s for s in seconds], "{:.2f}"), f"{row['ratio'][name]:.2f}"
            )
        table.caption = "forward and backward; medians; in brackets: quartiles"
        tables.append(table)
    return tables


def _ranks_tables(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    tables = []
    for network in found:
        table = Table(
            "ranks",
            "form",
            "ms a step",
            "of local BN",
            "model",
            "model, measured stretch",
            title=f"{network['network']}, {network['layers']} normalizations",
        )
        for row in network["ranks"]:
            for form, seconds in row["seconds"].items():
                over = _quartiles(row["overhead"][form], "{:+.0%}") if form in row["overhead"] else ""
                model = [f"{s * 1000:.1f}" for s in row["predicted"].get(form, ())] or ["", ""]
                milliseconds = _quartiles([s * 1000 for s in seconds], "{:.1f}")
                table.add_row(str(row["ranks"]), form, milliseconds, over, *model)
        table.caption = f"medians; in brackets: quartiles; {network['cores']} cores"
        tables.append(table)
    links = Table(
        "ranks", "network", "collectives of BN", "bytes", "computed", "links", title="Collectives a step"
    )
    for network in found:
        for row in network["ranks"]:
            measured, computed = row["collectives"]["measured"], row["collectives"]["computed"]
            for kind, (times, num_bytes) in measured.items():
                lines = (
                    f"{size} ranks {latency * 1e6:.0f} µs, {bandwidth / 1e9:.2f} GB/s"
                    for size, (latency, bandwidth) in row["links"][kind].items()
                )
                same = "the same" if [times, num_bytes] == computed[kind] else str(computed[kind])
                cells = (f"{times} {kind}", f"{num_bytes:,}", same, "; ".join(lines))
                links.add_row(str(row["ranks"]), network["network"].split(",")[0], *cells)
    refusals = {network["torch.nn.SyncBatchNorm"] for network in found}
    links.caption = "torch.nn.SyncBatchNorm: " + "; ".join(r or "runs here" for r in sorted(refusals))
    return [*tables, links]


def scaling_table(work: Work, cluster: Cluster, *, batch: int, group_size: int) -> Table:
    """The model's step times of 1 to 1,024 GPUs."""
    table = Table(
        "GPUs",
        "local, ms",
        "",
        f"groups of {group_size}, ms",
        "",
        "synced, ms",
        "",
        title=f"{work.name}, {batch} images a GPU; nodes of {cluster.name}",
        caption="by the model, which no GPU has confirmed; beside it images a second and GPU, of one GPU's",
    )
    for row in clusters.table(work, cluster, batch=batch, group_size=group_size):
        cells = (f for t in row[1:] for f in (f"{t.total_s * 1000:.1f}", f"{t.efficiency:.0%}"))
        table.add_row(f"{row.ranks:,}", *cells)
    return table


TABLES: dict[str, Callable[[Any], list[Table]]] = {
    "kernels": _kernel_tables,
    "step": _step_tables,
    "memory": _memory_tables,
    "kinds": _kinds_tables,
    "whitening": _whitening_tables,
    "fold": _fold_tables,
    "loader": _loader_tables,
    "watch": _watch_tables,
    "export": _export_tables,
    "adapt": _adapt_tables,
    "recurrent": _recurrent_tables,
    "ranks": _ranks_tables,
}
"""From a benchmark's results to what is printed, by kind."""
