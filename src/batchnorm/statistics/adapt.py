"""A trained network in a new domain: its normalizations take the statistics that are found there."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from batchnorm.statistics.adaptation_report import AdaptationReport
from batchnorm.statistics.adapting import Adapting, adapt_statistics, learn_affine
from batchnorm.statistics.entropy import MakeOptimizer
from batchnorm.statistics.feeding import Forward
from batchnorm.statistics.predictions import Logits, logits_of

METHODS = ("statistics", "blended", "entropy")

_OPTIONS = {"prior": "blended", "rate": "entropy", "optimizer": "entropy", "epochs": "entropy"}

PRIOR = 16.0
RATE = 1e-3


def adapt(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    method: str = "statistics",
    forward: Forward | None = None,
    logits: Logits | None = logits_of,
    prior: float | None = None,
    rate: float | None = None,
    optimizer: MakeOptimizer | None = None,
    epochs: int | None = None,
    check: int = 256,
    trust: bool = False,
) -> AdaptationReport:
    """Adapt a trained network to the domain of unlabelled data, in place, in its batch normalizations alone.

    - ``method="statistics"``: running statistics become those of the new data, in one pass in which
      every batch is normalized by itself: AdaBN. At the speed of inference.
    - ``method="blended"``: (N·stored + n·new)/(N + n), means and variances alike, for n examples and a
      prior that counts the stored statistics as N. For few examples: a single image is enough for a
      convolutional network. The layers are settled one after the other, as by
      ``recalibrate(method="exact")``, so that any split of the data gives the same; for L layers that
      takes about L/2 passes.
    - ``method="entropy"``: as "statistics", then γ and β step down the entropy of the predictions, a
      step a batch, and the statistics are taken anew: Tent. γ and β carry over from batch to batch
      (online); for an adaptation to each batch by itself (episodic), call it for the batch and leave
      the report's block. If predictions gather in few classes, everything is put back.

    Everything else is afterwards as before: other parameters, modes, hooks, gradients, random state.
    If anything raises, so are the statistics, γ and β. While data pass, dropout is off.

    Not trusted, and refused, are too few examples (more than 0.25 deviations of standard error in a
    layer's mean, taken as 1/√n: batches of fewer than 16 examples, unless blended with a prior) and
    predictions that are too one-sided (with 99 % confidence, one of K classes has more than a share of
    (K + 1)/(2K), in all or in most batches): see ``trust``.

    Args:
        model: As in `recalibrate`; so are the layers that are left alone.
        batches: As in `recalibrate`. The leading dimension of a batch's first tensor counts its examples. An
            iterator is gone through once by "statistics", and kept in memory by the others.
        method: "statistics", "blended" or "entropy".
        forward: As in `recalibrate`; for predictions it has to return the model's output.
        logits: ``logits(output)`` returns the logits, shape (N, K). By default the output, or its first item.
            ``None`` for a network that is no classifier: nothing is known of predictions.
        prior: N of "blended", in examples; 16 by default.
        rate: Learning rate of "entropy", whose optimizer is Adam; 0.001 by default.
        optimizer: ``optimizer(parameters)`` makes another one, in place of ``rate``.
        epochs: How often "entropy" goes through the batches; once by default.
        check: Predictions before and after are of the first batches, up to this many examples.
        trust: Adapt where it would be refused; the reason is then in the notes.

    Returns:
        What moved and how predictions changed; ``report.rollback()`` undoes it all.

    Raises:
        ValueError: Batches that are not trusted, or without examples, or not finite, or with a single value
            a channel in a layer; no batch normalization to adapt; no γ and β to learn; an unknown
            method, or an option of another one.
        TypeError: An output has no logits where they are needed, or a batch does not fit the model.
        RuntimeError: Batch and model are on different devices.

    Warns:
        UserWarning: "entropy" collapsed, and was undone.

    Source: Li et al. (2016), Revisiting Batch Normalization for Practical Domain Adaptation (AdaBN);
    Schneider et al. (2020), Improving robustness against common corruptions by covariate shift
    adaptation, for the blend; Wang et al. (2021), Tent.
    """
    _check_options(method, prior=prior, rate=rate, optimizer=optimizer, epochs=epochs)
    if check < 1:
        raise ValueError(f"check must be at least 1 example, got {check}")
    if method == "entropy" and logits is None:
        raise ValueError('method="entropy" needs logits: give logits=callable(output)')
    if method == "blended":
        prior = PRIOR if prior is None else float(prior)
    task = Adapting(
        model, batches, forward, logits, prior, check=check, trust=trust, once=method == "statistics"
    )
    if method == "entropy":
        return learn_affine(task, RATE if rate is None else rate, optimizer, 1 if epochs is None else epochs)
    return adapt_statistics(task)


def _check_options(method: str, **options: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    for name, value in options.items():
        if value is None:
            continue
        if _OPTIONS[name] != method:
            raise ValueError(f"{name} is of method={_OPTIONS[name]!r}; {method!r} has no use for it")
        if name != "optimizer" and not value > 0:
            raise ValueError(f"{name} must be above zero, got {value}")
    if options["rate"] is not None and options["optimizer"] is not None:
        raise ValueError("rate is that of the default optimizer: with optimizer=, set it there")
