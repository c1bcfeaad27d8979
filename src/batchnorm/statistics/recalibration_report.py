"""What a recalibration did, layer by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from batchnorm.moments import Moments
from batchnorm.statistics.metric import MetricChange


def distance(old: Moments, new: Moments, eps: float) -> float:
    """How far ``new`` is from ``old`` as the layer's output sees it, largest over channels.

    The larger of the mean's move in units of ``sqrt(new.var + eps)`` and the relative change of
    ``sqrt(var + eps)``. With ``eps`` inside, constant channels are compared on the scale on which
    the layer really divides them. Statistics that are not finite are infinitely far.
    """
    new_std = (new.var.double() + eps).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    move = (new.mean.double() - old.mean.double()).abs() / new_std
    stretch = ((old.var.double() + eps).sqrt() / new_std - 1).abs()
    farthest = torch.stack([move, stretch]).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return farthest.max().item() if farthest.numel() else 0.0


@dataclass(frozen=True)
class LayerChange:
    """One layer's statistics before and after.

    Attributes:
        name: The layer's path in the model.
        old_mean: Running mean before, shape of the layer's buffer.
        old_var: Running variance before, the same shape.
        new_mean: Population mean, as it is now stored (unless the report says ``kept_old``).
        new_var: Unbiased population variance, likewise.
        count: Samples a channel that the new statistics come from, all ranks together.
        num_calls: How often the layer was called for them; stored as ``num_batches_tracked``.
        shift: Largest move of a channel's mean, in new deviations (``sqrt(var + eps)``).
        stretch: Largest factor, at least 1, by which a channel's deviation grew or shrank.
        mean_error: Standard error of the new mean, in deviations (``sqrt(var + eps)``), largest over
            channels: how far it may be from that of endless data. It is estimated from how much the
            batches differ, which makes no assumption on the samples within one, but takes the
            batches for independent (shuffled). ``None`` if there is only one. For "paper" it is that
            of the pooled statistics.
        std_error: Standard error of the new deviation ``sqrt(var + eps)``, relative to it; likewise.
        paper_gap: For ``method="paper"``: the largest relative difference, over channels, between
            the deviation from averaged batch variances and the one of the pooled samples.
            ``None`` for the other methods.
    """

    name: str
    old_mean: Tensor
    old_var: Tensor
    new_mean: Tensor
    new_var: Tensor
    count: int
    num_calls: int
    shift: float
    stretch: float
    mean_error: float | None = None
    std_error: float | None = None
    paper_gap: float | None = None

    @property
    def standard_error(self) -> float | None:
        """The larger of ``mean_error`` and ``std_error``."""
        if self.mean_error is None or self.std_error is None:
            return None
        return max(self.mean_error, self.std_error)


def layer_change(
    name: str,
    *,
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    eps: float,
    count: int,
    num_calls: int,
    errors: tuple[float, float],
    paper_gap: float | None = None,
) -> LayerChange:
    """A `LayerChange` with its distances computed; ``old`` and ``new`` are (mean, unbiased variance)."""
    old_std = (old[1].double() + eps).sqrt()
    new_std = (new[1].double() + eps).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    ratio = (old_std / new_std).nan_to_num(nan=torch.inf, posinf=torch.inf)
    move = ((new[0].double() - old[0].double()).abs() / new_std).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return LayerChange(
        name=name,
        old_mean=old[0],
        old_var=old[1],
        new_mean=new[0],
        new_var=new[1],
        count=count,
        num_calls=num_calls,
        shift=move.max().item(),
        stretch=torch.maximum(ratio, 1 / ratio).max().item(),
        mean_error=errors[0] if math.isfinite(errors[0]) else None,
        std_error=errors[1] if math.isfinite(errors[1]) else None,
        paper_gap=paper_gap,
    )


def layer_table(layers: Sequence[LayerChange]) -> list[str]:
    """The lines of a table of the layers' changes."""
    paper = any(layer.paper_gap is not None for layer in layers)
    header = ["layer", "channels", "samples/channel", "mean moved (std)", "std changed (×)", "std. error"]
    if paper:
        header.append("paper's std off by")
    rows = [header]
    for layer in layers:
        cells = [layer.name or "(model)", str(layer.new_mean.numel()), str(layer.count)]
        cells += [f"{layer.shift:.3g}", f"{layer.stretch:.3g}"]
        cells.append("?" if layer.standard_error is None else f"{layer.standard_error:.2g}")
        if paper:
            cells.append("" if layer.paper_gap is None else f"{layer.paper_gap:.2%}")
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return lines


def counted(num: int, what: str, plural: str = "s") -> str:
    """A number of things, with the plural where there is not one."""
    return f"{num} {what}{plural * (num != 1)}"


@dataclass(frozen=True)
class RecalibrationReport:
    """What `recalibrate` did; ``print`` it for a table.

    Attributes:
        method: "exact", "pooled" or "paper".
        layers: The layers that got new statistics, in the order of the model's modules.
        num_batches: Batches that were used, all ranks together.
        num_passes: How often the data was gone through. A pass of the exact method ends where the
            next unknown layer begins, so that all but the last one or two cost about half.
        residual: For the exact method, how far the statistics that the model produces when it
            runs on the stored ones are from them, in deviations, largest over layers and
            channels; 0.0 is exact to the last bit. ``None`` for the other methods.
        converged: Whether ``residual`` is within the tolerance; true for the other methods.
        notes: What was left alone and why, and what to know about the result.
        metric: The metric with the old statistics and with the new ones, if one was given.
        kept_old: The new statistics were worse by the metric, and the old ones are in place:
            nothing of the model was changed.
    """

    method: str
    layers: tuple[LayerChange, ...]
    num_batches: int
    num_passes: int
    residual: float | None
    converged: bool
    notes: tuple[str, ...] = ()
    metric: MetricChange | None = None
    kept_old: bool = False

    @property
    def standard_error(self) -> float | None:
        """The largest of all layers, in deviations; ``None`` where one batch alone tells nothing of it."""
        errors = [layer.standard_error for layer in self.layers]
        known = [error for error in errors if error is not None]
        return max(known) if known and len(known) == len(errors) else None

    def __str__(self) -> str:
        lines = layer_table(self.layers)
        done = "measured" if self.kept_old else "recalibrated"
        title = f"{done} {counted(len(self.layers), 'layer')}, method {self.method!r}: "
        title += f"{counted(self.num_batches, 'batch', 'es')}, {counted(self.num_passes, 'pass', 'es')}"
        if self.residual is not None:
            title += f", residual {self.residual:.1e} deviations"
        if not self.converged:
            title += " — NOT CONVERGED"
        if self.metric is not None:
            lines.append(str(self.metric))
        if self.kept_old:
            lines.append("the old statistics are kept: nothing was changed")
        return "\n".join([title, *lines, *(f"note: {note}" for note in self.notes)])
