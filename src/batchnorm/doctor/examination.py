"""Everything that the detectors judge by, measured once on a copy of the model."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.doctor.data import Loss, mixed
from batchnorm.doctor.fit import Fit, fit_of
from batchnorm.doctor.observe import Observation, Seen, is_frozen, norms_of, observe
from batchnorm.doctor.step import Step, take_step
from batchnorm.statistics import recalibrate
from batchnorm.statistics.choose import statistics_of, store
from batchnorm.statistics.feeding import Forward
from batchnorm.surgery.models import copied

# Beyond this many layers, the exact method's pass for each of them would be most of a diagnosis.
_EXACT_UP_TO = 20
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass
class Gap:
    """A model's distance between inference and training, on the same examples.

    Attributes:
        inference: Pass with running statistics.
        batch: Pass with the statistics of each batch.
    """

    inference: Observation
    batch: Observation

    @property
    def what(self) -> str:
        """Its name."""
        return "gap of the loss" if self._has_losses else "distance of the outputs"

    @property
    def value(self) -> float:
        """Difference of the losses, or without them `distance`."""
        if self._has_losses:
            return abs(self.inference.loss - self.batch.loss)
        return self.distance

    @property
    def _has_losses(self) -> bool:
        return self.inference.loss is not None and self.batch.loss is not None

    @property
    def distance(self) -> float:
        """Between the outputs, in their own deviations; nan where they do not match."""
        return distance(self.inference.outputs, self.batch.outputs)


def distance(first: Sequence[Sequence[Tensor]], second: Sequence[Sequence[Tensor]]) -> float:
    """Root mean square of the difference, by the deviation of ``second``; nan where shapes differ."""
    flat = [[t.double().flatten() for batch in outputs for t in batch] for outputs in (first, second)]
    if not flat[1] or [t.shape for t in flat[0]] != [t.shape for t in flat[1]]:
        return float("nan")
    one, other = torch.cat(flat[0]), torch.cat(flat[1])
    spread = other.std(correction=0).clamp(min=torch.finfo(torch.float64).tiny)
    return float((one - other).square().mean().sqrt() / spread)


@dataclass
class Examination:
    """A model, its data, and what each pass has shown. Made by `examine`.

    Attributes:
        model: A copy, in the user's own mode.
        layers: Its normalizations.
        given: Batches as they came.
        data: The same examples mixed, or ``given`` where they cannot be.
        is_mixed: Whether they could be.
        forward: How the model is called.
        loss: Of the user, or None.
        resting: Layers in evaluation mode inside a model in training mode: frozen by hand.
        decayed: Normalizations whose γ or β the user's optimizer decays; see `decayed_of`.
        group: Ranks to compare with, or None.
        inference: Pass of ``data`` with running statistics.
        came: Pass of ``given``, each batch normalized by itself.
        batch: The same of ``data``.
        dropped: As ``batch`` with dropout; None if there is none.
        step: One step of training, in float64; None where it failed.
        notes: What could not be done.
    """

    model: nn.Module
    layers: dict[str, _BatchNorm]
    given: list[Any]
    data: list[Any]
    is_mixed: bool
    forward: Forward | None
    loss: Loss | None
    resting: frozenset[str]
    decayed: dict[str, float]
    group: dist.ProcessGroup | None
    inference: Observation
    came: Observation
    batch: Observation
    dropped: Observation | None
    step: Step | None
    notes: list[str] = field(default_factory=list)

    def observe(self, model: nn.Module, batches: Sequence[Any], mode: str) -> Observation:
        """A pass with the settings of this examination."""
        return observe(model, batches, mode, forward=self.forward, loss=self.loss, resting=self.resting)

    @property
    def seen(self) -> dict[str, Seen]:
        """What the layers receive when all before them normalize by mixed batches."""
        return self.batch.seen

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """How well each layer's running statistics fit the data, of layers that have any."""
        return {
            name: fit_of(self.layers[name], seen.moments)
            for name, seen in self.seen.items()
            if self.layers[name].running_mean is not None
        }

    @cached_property
    def gap(self) -> Gap:
        """As the model is."""
        return Gap(self.inference, self.batch)

    def gap_after(self, change: Callable[[nn.Module], object]) -> Gap:
        """Of a copy of the model after ``change``."""
        cured = copied(self.model)
        with torch.no_grad():
            change(cured)
        return Gap(self.observe(cured, self.data, "inference"), self.observe(cured, self.data, "batch"))

    @cached_property
    def population(self) -> dict[str, tuple[Tensor, ...]]:
        """What recalibration on these data would store, by layer."""
        model = copied(self.model)
        self.recalibrate(model)
        return {
            name: tuple(map(torch.clone, statistics_of(layer)))
            for name, layer in norms_of(model).items()
            if layer.running_mean is not None
        }

    def gap_with_population(self, names: Collection[str]) -> Gap:
        """The gap with the statistics of the data in these layers, and the others as they are."""

        def change(model: nn.Module) -> None:
            layers = norms_of(model)
            for name in names:
                store(layers[name], *self.population[name])

        return self.gap_after(change)

    def recalibrate(self, model: nn.Module) -> None:
        """Give a copy of the model the statistics of the data."""
        for name, layer in norms_of(model).items():
            layer.training = name not in self.resting  # none of them shall pass for frozen
        model.training = True
        method = "exact" if len(self.layers) <= _EXACT_UP_TO else "pooled"
        recalibrate(model, self.data, forward=self.forward, method=method)


def examine(
    model: nn.Module,
    given: list[Any],
    *,
    forward: Forward | None,
    loss: Loss | None,
    decayed: dict[str, float],
    group: dist.ProcessGroup | None,
    progress: Callable[[str], None],
) -> Examination:
    """Copy the model and run all passes; the model itself is not touched.

    Args:
        model: Of the user.
        given: Batches.
        forward: How to call it.
        loss: As for `loss_of`.
        decayed: As in `Examination`.
        group: As in `Examination`.
        progress: Told the name of each pass before it begins.
    """
    notes: list[str] = []
    copy = copied(model)
    layers = norms_of(copy)
    root_trains = copy.training
    resting = frozenset(
        name for name, layer in layers.items() if root_trains and not layer.training and not is_frozen(layer)
    )

    def see(batches: Sequence[Any], mode: str) -> Observation:
        return observe(copy, batches, mode, forward=forward, loss=loss, resting=resting)

    progress("batches as they came")
    came = see(given, "batch")
    sound = [batch for i, batch in enumerate(given) if i not in {index for index, _ in came.not_finite}]
    if not sound:
        index, name = came.not_finite[0]
        raise ValueError(
            f"batch {index}, layer {name or '(model)'!r}: values that are not finite, as in every batch "
            "given. Look for "
            "NaN or inf in the data, then in the weights before that layer"
        )
    data = mixed(sound)
    if data is None:
        notes.append(
            "the batches could not be cut and mixed (unlike shapes), so that their order and size stay in "
            "all figures"
        )
    progress("mixed batches")
    batch = see(data or sound, "batch")
    progress("inference")
    inference = see(data or sound, "inference")
    dropped = None
    if any(isinstance(module, _DROPOUT) and module.p > 0 for module in copy.modules()):
        progress("training mode")
        dropped = see(data or sound, "training")
    progress("a step")
    step = None
    try:
        step = take_step(copied(copy), (data or sound)[0], forward)
    except Exception as error:  # the user's model need not run in float64, or backward
        notes.append(f"no step of training could be tried in float64: {type(error).__name__}: {error}")
    unreached = [name for name in layers if name not in batch.seen and name not in inference.seen]
    notes += [f"{name!r} was not reached by any batch" for name in unreached]
    return Examination(
        model=copy,
        layers=layers,
        given=given,
        data=data or sound,
        is_mixed=data is not None,
        forward=forward,
        loss=loss,
        resting=resting,
        decayed=decayed,
        group=group,
        inference=inference,
        came=came,
        batch=batch,
        dropped=dropped,
        step=step,
        notes=notes,
    )
