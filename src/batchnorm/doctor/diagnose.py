"""Run a model on data in both modes, layer by layer, and say what is wrong."""

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from batchnorm.distributed import alone
from batchnorm.doctor import batch_findings, layer_findings, mode_findings, statistics_findings, use_findings
from batchnorm.doctor.data import Loss, kept
from batchnorm.doctor.diagnosis import LEVELS, Diagnosis, Finding, LayerFacts
from batchnorm.doctor.examination import Examination, examine
from batchnorm.doctor.observe import norms_of
from batchnorm.doctor.route import route
from batchnorm.statistics.feeding import Forward
from batchnorm.surgery.models import check_model


@alone()  # what is tried out here is no other rank's business
def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    forward: Forward | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    group: dist.ProcessGroup | None = None,
    num_batches: int | None = 32,
    progress: bool = False,
) -> Diagnosis:
    """Find what is wrong with a model's batch normalizations, and measure how much each cure helps.

    A copy of the model runs the data with running statistics and with those of the batches, as they
    come and mixed; takes one step of training in float64; and, for each finding whose cure can be
    tried from here, runs once more with the cure. The model itself, its mode and the random state
    stay as they are.

    docs/methods/diagnose.md lists all causes, by what they are told apart, and what goes unseen.

    Args:
        model: As it is used for inference; a model in training mode is a finding. Wrappers for data
            parallelism are looked through.
        batches: As the training loop gets them: their size and order are judged, too. Tensors; tuples
            whose first item is the input; or dicts of keyword arguments.
        loss: ``loss(output, batch)``, a number. By default the output's own ``"loss"``, or cross-entropy
            where outputs (N, K) meet integer labels (N,) as the tuple's second item; without any of
            them the gap is measured on the outputs.
        forward: ``forward(model, batch)`` runs the model on a batch, instead of the above.
        optimizer: Lets weight decay on γ and β be seen.
        group: Process group over which statistics are compared; every rank must call.
        num_batches: At most this many are looked at, and kept in memory; None for all.
        progress: Draw a progress bar (needs rich, in ``batchnorm[train]``).

    Returns:
        Findings, ranked: what makes inference wrong first, by what the cure gains; ``print`` it.

    Raises:
        TypeError: Not a module; or batches that the model cannot be called with.
        ValueError: No batch normalization, a lazy or meta module, no batches, or none that is finite.
        RuntimeError: Batch and model are on different devices.
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    _check(model)
    with _shown(progress) as said:
        said("data")
        exam = examine(
            model,
            kept(batches, num_batches),
            forward=forward,
            loss=loss,
            decayed=layer_findings.decayed_of(model, optimizer),
            group=group,
            progress=said,
        )
        found: list[Finding] = []
        for detectors in (statistics_findings, use_findings, mode_findings, batch_findings, layer_findings):
            said("cures")
            found += detectors.find(exam)
    found.sort(key=lambda finding: (LEVELS.index(finding.level), -_gain(finding)))
    return Diagnosis(
        findings=tuple(found),
        layers=tuple(_facts(exam, name) for name in exam.seen),
        inference_loss=exam.inference.loss,
        batch_loss=exam.batch.loss,
        distance=exam.gap.distance,
        num_batches=len(exam.given),
        num_examples=sum(exam.batch.sizes),
        notes=tuple(exam.notes),
        route=route(exam.model, exam.data[0], forward),
    )


def _gain(finding: Finding) -> float:
    effect = finding.effect
    if effect is None or not effect.what.startswith(("gap", "distance of")):
        return 0.0
    gain = effect.before - effect.after
    return gain if gain == gain else float("inf")  # a loss that was not a number is all there is to gain


def _check(model: nn.Module) -> None:
    check_model(model, "a diagnosis")
    norms = norms_of(model)
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no batch normalization (torch.nn.BatchNorm*, or a subclass) to "
            "diagnose: "
            "bn.insert puts it in"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device and has no values: load the weights first")


def _facts(exam: Examination, name: str) -> LayerFacts:
    layer, seen = exam.layers[name], exam.seen[name]
    moments, fit = seen.moments, exam.fits.get(name)
    came = exam.came.seen.get(name)
    shown = exam.inference.seen.get(name)
    histogram = None if shown is None else shown.histogram
    keeps = layer.running_mean is not None

    def numbers(tensor: torch.Tensor) -> tuple[float, ...]:
        return tuple(tensor.detach().double().flatten().tolist())

    return LayerFacts(
        name=name,
        kind=type(layer).__name__,
        channels=moments.mean.numel(),
        running_mean=numbers(layer.running_mean) if keeps else (),
        running_var=numbers(layer.running_var) if keeps else (),
        mean=numbers(moments.mean),
        var=numbers(moments.var),
        mean_off=float("nan") if fit is None else fit.mean_off,
        std_off=float("nan") if fit is None else fit.std_off,
        noise=float("nan") if came is None else came.noise(layer.eps),
        histogram=() if histogram is None else tuple(int(count) for count in histogram),
    )


@contextmanager
def _shown(progress: bool) -> Any:
    """A function that is told what comes next, and shows it if asked for."""
    if not progress:
        yield lambda what: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise ImportError('progress=True draws with rich: pip install "batchnorm[train]"') from error
    columns = (TextColumn("diagnose"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=10)
        yield lambda what: bar.update(task, description=what, advance=1)
