"""Statistics of a part of the data, which processes that never meet can merge through files."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from batchnorm import files
from batchnorm.comoments import Comoments
from batchnorm.moments import Moments
from batchnorm.reading import parse_json
from batchnorm.statistics.choose import choose, restored, unwrapped
from batchnorm.statistics.feeding import Forward
from batchnorm.statistics.install import install
from batchnorm.statistics.methods import check_counts, standard_errors, train_through
from batchnorm.statistics.metric import Metric, measured
from batchnorm.statistics.passes import Pass, Passes
from batchnorm.statistics.recalibration_report import RecalibrationReport
from batchnorm.statistics.spread import Spread

_FORMAT = 1
_HEADER = "population"


@dataclass(frozen=True)
class Population:
    """Moments of what every normalization of a network receives, over some of the data.

    Attributes:
        moments: By the layer's path: float64 on the CPU, flat (C,), with the biased variance.
        spreads: By path, how the batches differ, from which standard errors follow.
        num_calls: Calls of each layer.
        num_batches: Batches that were run.
        weights: SHA-256 of the names and values of the network's parameters. Statistics are those
            of one set of weights: no others merge with them, or take them.
    """

    moments: dict[str, Moments]
    spreads: dict[str, Spread]
    num_calls: dict[str, int]
    num_batches: int
    weights: str

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        forward: Forward | None = None,
        group: dist.ProcessGroup | None = None,
        progress: bool = False,
    ) -> "Population":
        """Measure ``model`` on some batches, and leave it as it was.

        One pass in which every batch is normalized by itself, as by ``recalibrate(method="pooled")``:
        the only method whose parts can be measured without knowing the others.

        Args:
            model: As in `recalibrate`.
            batches: As in `recalibrate`; at least two samples a channel in each.
            forward: As in `recalibrate`.
            group: As in `recalibrate`: the part of the data that all its ranks hold together.
            progress: As in `recalibrate`.

        Raises:
            ValueError: As in `recalibrate`.
            TypeError: As in `recalibrate`.
            RuntimeError: As in `recalibrate`.
        """
        network = unwrapped(model)
        layers, _ = choose(network)
        passes = Passes(
            network, layers, batches, forward=forward, group=group, progress=progress, again=False
        )
        with torch.no_grad(), restored(model):
            found = train_through(passes)
        return cls(
            {name: _on_cpu(moments) for name, moments in found.moments.items()},
            {name: _spread_on_cpu(spread) for name, spread in found.spreads.items()},
            found.num_calls,
            found.num_batches,
            _fingerprint(network),
        )

    def merge(self, other: "Population") -> "Population":
        """The population of both parts of the data, weighted by their samples.

        Raises:
            ValueError: They were measured on different weights.
        """
        if self.weights != other.weights:
            raise ValueError(
                "populations merge only if they were measured on the same weights: one comes from "
                f"{self.weights[:12]}…, the other from {other.weights[:12]}… (SHA-256 of the parameters). "
                "Load the same checkpoint, in the same dtype, in every process"
            )
        moments, spreads, num_calls = dict(self.moments), dict(self.spreads), dict(self.num_calls)
        for name, part in other.moments.items():
            moments[name] = moments[name].merge(part) if name in moments else part
            spreads[name] = (
                spreads[name].merge(other.spreads[name]) if name in spreads else other.spreads[name]
            )
            num_calls[name] = num_calls.get(name, 0) + other.num_calls[name]
        return Population(moments, spreads, num_calls, self.num_batches + other.num_batches, self.weights)

    @classmethod
    def merged(cls, parts: Iterable["Population"]) -> "Population":
        """All of ``parts`` in one.

        Raises:
            ValueError: There are no parts, or they were measured on different weights.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("Population.merged needs at least one part; it was given none")
        return reduce(cls.merge, parts)

    def store_in(
        self,
        model: nn.Module,
        *,
        metric: Metric | None = None,
        higher_is_better: bool = True,
        keep_better: bool = False,
    ) -> RecalibrationReport:
        """Make the population's mean and unbiased variance the running statistics of ``model``, in place.

        Args:
            model: The network that was measured, in any wrapper. Frozen layers are left alone.
            metric: As in `recalibrate`.
            higher_is_better: As in `recalibrate`.
            keep_better: As in `recalibrate`.

        Raises:
            ValueError: The population was measured on other weights, a layer got fewer than two
                samples a channel, or ``keep_better`` without ``metric``.
            TypeError: The metric is no number.
        """
        if keep_better and metric is None:
            raise ValueError("keep_better needs a metric to judge by: pass metric=callable(model) too")
        network = unwrapped(model)
        layers, notes = choose(network)
        here = _fingerprint(network)
        if here != self.weights:
            raise ValueError(
                f"this population was measured on weights {self.weights[:12]}…, and {type(network).__name__} "
                f"has {here[:12]}… (SHA-256 of the parameters): load the checkpoint, in the dtype, that was "
                "measured, or measure this model"
            )
        source = Pass(self.moments, {}, self.spreads, self.num_calls, self.num_batches)
        check_counts(layers, source)
        found = {name: moments for name, moments in self.moments.items() if name in layers}
        errors = standard_errors(layers, Pass(found, {}, {name: self.spreads[name] for name in found}))
        changes, outcome, kept_old = install(
            model,
            layers,
            {name: m.estimates() for name, m in found.items()},
            source,
            errors=errors,
            paper_gaps={},
            metric=metric,
            before=None if metric is None else measured(metric, model, None),
            higher_is_better=higher_is_better,
            keep_better=keep_better,
            group=None,
        )
        notes += [
            f"{name!r} unchanged: the population has nothing of it" for name in layers if name not in found
        ]
        return RecalibrationReport(
            method="pooled",
            layers=changes,
            num_batches=self.num_batches,
            num_passes=1,
            residual=None,
            converged=True,
            notes=tuple(notes),
            metric=outcome,
            kept_old=kept_old,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; its JSON header holds the counts.

        Raises:
            OSError: The disk refused; what stood at ``path`` is still there.
        """
        tensors: dict[str, Tensor] = {}
        layers = {}
        for name, moments in self.moments.items():
            spread = self.spreads[name]
            tensors[f"{name}.mean"], tensors[f"{name}.biased_var"] = moments.mean, moments.var
            if isinstance(moments, Comoments):
                tensors[f"{name}.biased_cov"] = moments.cov
            tensors[f"{name}.spread"] = torch.cat([spread.center[None], spread.level[None], spread.sums])
            layers[name] = {
                "count": int(moments.count),
                "calls": self.num_calls[name],
                "batches": spread.num,
                "squared_counts": spread.weight,
            }
        header = {
            "format": _FORMAT,
            "weights": self.weights,
            "num_batches": self.num_batches,
            "layers": layers,
        }
        # Copies, as safetensors refuses views; one entry, as it writes several in random order.
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        data = safetensors.torch.save(copies, {_HEADER: json.dumps(header, allow_nan=False)})
        files.write_bytes(Path(path), data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Population":
        """Read what `save` wrote; nothing in the file is ever executed.

        Raises:
            ValueError: The file is missing, damaged, of another kind, or of a newer format.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_HEADER)
                if text is None:
                    raise ValueError(
                        f"its metadata have no entry {_HEADER!r}: Population.save did not write it"
                    )
                header = parse_json(text)
                if header["format"] != _FORMAT:
                    raise ValueError(f"it has format {header['format']}, and this version reads {_FORMAT}")
                moments, spreads, num_calls = {}, {}, {}
                for name, counts in header["layers"].items():
                    mean, var, spread = (
                        file.get_tensor(f"{name}.{part}") for part in ("mean", "biased_var", "spread")
                    )
                    moments[name], spreads[name] = _checked(name, mean, var, spread, counts)
                    if f"{name}.biased_cov" in file.keys():  # noqa: SIM118  (the file is no dictionary)
                        moments[name] = _with_cov(name, moments[name], file.get_tensor(f"{name}.biased_cov"))
                    num_calls[name] = int(counts["calls"])
                return cls(moments, spreads, num_calls, int(header["num_batches"]), str(header["weights"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{path} is not a population that can be read: {error}") from error


def _checked(
    name: str, mean: Tensor, var: Tensor, spread: Tensor, counts: dict[str, Any]
) -> tuple[Moments, Spread]:
    size = mean.numel()
    shapes = (tuple(mean.shape), tuple(var.shape), tuple(spread.shape))
    if shapes != ((size,), (size,), (7, size)):
        raise ValueError(f"layer {name!r} has shapes {shapes}, expected {((size,), (size,), (7, size))}")
    if not all(t.dtype == torch.float64 and t.isfinite().all() for t in (mean, var, spread)):
        raise ValueError(f"layer {name!r} has values that are not finite, or not float64")
    count, num, weight = int(counts["count"]), int(counts["batches"]), float(counts["squared_counts"])
    if (var < 0).any() or count < 0 or num < 0 or not 0 <= weight < math.inf:
        raise ValueError(f"layer {name!r} has a negative variance or count")
    center, level, sums = spread.split([1, 1, 5])
    return Moments(mean, var, count), Spread(center[0], level[0], sums, weight, num)


def _with_cov(name: str, moments: Moments, cov: Tensor) -> Comoments:
    size = len(moments.mean)
    if cov.dim() != 2 or len(cov) != size or cov.dtype != torch.float64 or not cov.isfinite().all():
        raise ValueError(
            f"layer {name!r} has covariances of shape {tuple(cov.shape)}, {cov.dtype}, for {size} channels, "
            "or some that are not finite"
        )
    return Comoments(moments.mean, moments.var, moments.count, cov)


def _on_cpu(moments: Moments) -> Moments:
    return replace(moments.map(Tensor.cpu), count=int(moments.count))


def _spread_on_cpu(spread: Spread) -> Spread:
    return Spread(spread.center.cpu(), spread.level.cpu(), spread.sums.cpu(), spread.weight, spread.num)


def _fingerprint(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in network.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
