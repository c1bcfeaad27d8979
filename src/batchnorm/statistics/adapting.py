"""The methods of adaptation, on one model and its batches."""

import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm import distributed
from batchnorm.moments import Moments
from batchnorm.statistics.adaptation_report import AdaptationReport
from batchnorm.statistics.choose import choose, restored, statistics_of, store, unwrapped
from batchnorm.statistics.entropy import MakeOptimizer, collapsed, learn, scales_and_shifts
from batchnorm.statistics.feeding import Forward, feed, num_examples
from batchnorm.statistics.install import install
from batchnorm.statistics.methods import check_counts, settle, standard_errors, train_through
from batchnorm.statistics.passes import Pass, Passes, eagerly, same_random_numbers
from batchnorm.statistics.predictions import Logits, Predictions, predictions
from batchnorm.statistics.recalibration_report import LayerChange
from batchnorm.statistics.state import LEARNED, STATISTICS, State, put_state, state_of
from batchnorm.statistics.trust import one_sided, too_few

_TOLERANCE = 1e-6
"""Residual of "blended", in deviations, above which the report says that it did not settle."""

Statistics = dict[str, tuple[Tensor, ...]]
"""Mean and unbiased variance of each layer, float64, flat."""


class Adapting:
    """One adaptation: the model, its layers, the batches, and what of them is not trusted.

    Args:
        model: As in `adapt`; so are the others.
        batches: Iterators are kept in memory, unless ``once``.
        forward: How to call the model; `feed` when ``None``.
        logits: Where they are in the output, or ``None``.
        prior: Examples that stored statistics stand for, where they are blended.
        check: Examples for predictions.
        trust: Adapt in spite of doubts.
        once: The data are gone through once.

    Attributes:
        notes: For the report.
        head: The first batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Forward | None,
        logits: Logits | None,
        prior: float | None,
        *,
        check: int,
        trust: bool,
        once: bool,
    ) -> None:
        self.model, self.network = model, unwrapped(model)
        self.layers, self.notes = choose(self.network)
        self.forward: Forward = forward or feed
        self.logits, self.prior, self.trust = logits, prior, trust
        if isinstance(batches, Iterator):
            if not once:
                batches = list(batches)
            self.head = _first(iter(batches), check)
            self.batches = Counted(chain(self.head, batches) if once else batches)
        else:
            with same_random_numbers(self.network):
                self.head = _first(iter(batches), check)
            self.batches = Counted(batches)

    def predict(self) -> Predictions | None:
        """Of the first examples, as the model stands."""
        if self.logits is None or not self.head:
            return None
        with torch.no_grad(), restored(self.model), same_random_numbers(self.network):
            with eagerly(), distributed.alone():
                return predictions(self.network, self.head, self.forward, self.logits)

    def examined(self) -> Predictions | None:
        """The first predictions, if the examples can be trusted.

        Raises:
            ValueError: They cannot.
        """
        if self.prior is None and self.head:
            self.doubt(too_few(sum(map(num_examples, self.head)), len(self.head), None))
        found = self.predict()
        self.doubt(None if found is None else one_sided(found))
        return found

    def doubt(self, reason: str | None) -> None:
        """Refuse for a reason, if there is one, or note it.

        Raises:
            ValueError: There is one, and no trust.
        """
        if reason is None:
            return
        if not self.trust:
            raise ValueError(f"not adapted, and nothing was changed: {reason}")
        self.notes.append(f"trusted all the same: {reason}")

    def passes(self) -> Passes:
        """Over all the batches."""
        return Passes(
            self.network,
            self.layers,
            self.batches,
            forward=self.forward,
            group=None,
            progress=False,
            again=False,
        )


class Counted:
    """Batches that may be gone through again, and how many examples came in the latest pass."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self.num_examples = 0

    def __iter__(self) -> Iterator[Any]:
        self.num_examples = 0
        for batch in self._batches:
            self.num_examples += num_examples(batch)
            yield batch


def adapt_statistics(task: Adapting) -> AdaptationReport:
    """Methods "statistics" and, with a prior, "blended"."""
    before = task.examined()
    saved = state_of(task.layers, STATISTICS)
    found, last = _own(task) if task.prior is None else _blended(task, task.prior)
    try:
        changes = _install(task, found, last)
        after = task.predict()
    except BaseException:
        put_state(task.layers, saved)
        raise
    method = "statistics" if task.prior is None else "blended"
    return _report(task, method, changes, last, before, after, saved)


def learn_affine(
    task: Adapting, rate: float, optimizer: MakeOptimizer | None, epochs: int
) -> AdaptationReport:
    """Method "entropy"."""
    layers, logits = task.layers, task.logits
    assert logits is not None
    scales_and_shifts(layers)  # complains before there is work
    before = task.examined()
    saved = state_of(layers, (*LEARNED, *STATISTICS))
    try:
        _put(layers, _own(task)[0])
        start = task.predict()
        with restored(task.model), same_random_numbers(task.network), eagerly(), distributed.alone():
            options: dict[str, Any] = {"rate": rate, "optimizer": optimizer, "epochs": epochs}
            course = learn(task.network, layers, task.batches, task.forward, logits, **options)
        found, last = _own(task)
        learned = state_of(layers, LEARNED)
        put_state(layers, saved)
        changes = _install(task, found, last)
        put_state(layers, learned)
        after = task.predict()
        undone = None if start is None or after is None else collapsed(start, after)
    except BaseException:
        put_state(layers, saved)
        raise
    if undone is not None:
        put_state(layers, saved)
        warnings.warn(undone, stacklevel=3)
    return _report(task, "entropy", changes, last, before, after, saved, tuple(course), undone)


def _own(task: Adapting) -> tuple[Statistics, Pass]:
    """Statistics of the data in one pass, each batch normalized by itself."""
    passes = task.passes()
    with torch.no_grad(), restored(task.model):
        last = train_through(passes, own=True)
        check_counts(task.layers, last)
    return {name: m.estimates() for name, m in last.moments.items()}, last


def _blended(task: Adapting, prior: float) -> tuple[Statistics, Pass]:
    """Statistics between those stored and the data's; every layer receives what the blend before it gives."""
    layers, stored = task.layers, {}
    found: Statistics = {}
    for name, layer in layers.items():
        stored[name] = tuple(t.double() for t in statistics_of(layer))
        if not all(t.isfinite().all() for t in stored[name]):
            raise ValueError(
                f"layer {name!r}: the stored statistics are not finite, so that nothing can be blended with "
                'them; method="statistics" replaces them'
            )

    def put(name: str, moments: Moments) -> None:
        share = task.batches.num_examples / (prior + task.batches.num_examples)
        pairs = zip(stored[name], moments.estimates(), strict=True)
        found[name] = tuple(torch.lerp(old, new.view_as(old), share) for old, new in pairs)
        store(layers[name], *found[name])

    with torch.no_grad(), restored(task.model):
        _, last, residual = settle(task.passes(), _TOLERANCE, put)
        check_counts(layers, last)
    task.doubt(too_few(task.batches.num_examples, last.num_batches, prior))
    if residual > _TOLERANCE:
        task.notes.append(
            f"not settled: run on the blend, the model gives other statistics ({residual:.1e} deviations "
            "away): batches differ from pass to pass, or a layer is called several times and feeds itself"
        )
    return {name: found[name] for name in layers if name in last.moments}, last


@torch.no_grad()
def _put(layers: dict[str, _BatchNorm], found: Statistics) -> None:
    for name, new in found.items():
        store(layers[name], *new)


def _install(task: Adapting, found: Statistics, last: Pass) -> tuple[LayerChange, ...]:
    task.notes += [
        f"{name!r} unchanged: no batch reached it in evaluation mode"
        for name in task.layers
        if name not in found
    ]
    changes, _, _ = install(
        task.model,
        task.layers,
        found,
        last,
        errors=standard_errors(task.layers, last),
        paper_gaps={},
        metric=None,
        before=None,
        higher_is_better=True,
        keep_better=False,
        group=None,
    )
    return changes


def _report(
    task: Adapting,
    method: str,
    changes: tuple[LayerChange, ...],
    last: Pass,
    before: Predictions | None,
    after: Predictions | None,
    saved: State,
    course: tuple[float, ...] = (),
    undone: str | None = None,
) -> AdaptationReport:
    return AdaptationReport(
        method=method,
        layers=changes,
        num_examples=task.batches.num_examples,
        num_batches=last.num_batches,
        before=before,
        after=after,
        entropies=course,
        undone=undone,
        notes=tuple(dict.fromkeys(task.notes)),
        _undo=lambda: put_state(task.layers, saved),
    )


def _first(batches: Iterator[Any], num: int) -> list[Any]:
    """The first batches, until they have so many examples."""
    found, total = [], 0
    while total < num and (batch := next(batches, None)) is not None:
        found.append(batch)
        total += num_examples(batch)
    return found
