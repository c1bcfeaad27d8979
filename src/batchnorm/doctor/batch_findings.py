"""Batches that training cannot normalize well: too small, of one value, sorted, or not finite."""

import math

from batchnorm.doctor.data import labels_of
from batchnorm.doctor.diagnosis import Effect, Finding
from batchnorm.doctor.examination import Examination, Gap
from batchnorm.doctor.observe import is_frozen

# Deviation of a batch's mean in deviations of the samples: ten independent ones.
NOISY = 0.3
# Variance between batches by that of batches drawn at random.
SORTED = 3.0


def find(exam: Examination) -> list[Finding]:
    """All findings about batches."""
    uneven = _sorted(exam)
    return [*_not_finite(exam), *_single(exam), *uneven, *([] if uneven else _small(exam))]


def _not_finite(exam: Examination) -> list[Finding]:
    bad = exam.came.not_finite
    if not bad:
        return []
    layers = tuple(dict.fromkeys(name for _, name in bad))
    which = ", ".join(str(index) for index, _ in bad[:5]) + (", …" if len(bad) > 5 else "")
    return [
        Finding(
            "not-finite",
            "wrong",
            layers,
            f"{len(bad)} of {len(exam.given)} batches ({which}) reach {layers[0]!r} with values that are "
            "not finite; "
            "torch's layers would keep NaN in their running statistics for ever. They are left out of all "
            "that follows",
            {"batches": len(bad)},
            "find NaN or inf in those batches, or what overflows before that layer",
            Effect("batches that are not finite", len(bad), 0),
        )
    ]


def _single(exam: Examination) -> list[Finding]:
    bad = exam.came.single
    if not bad:
        return []
    layers = tuple(dict.fromkeys(name for _, name in bad))
    left = len(exam.batch.single) if exam.is_mixed else None
    return [
        Finding(
            "one-value",
            "wrong",
            layers,
            f"{len(bad)} of {len(exam.given)} batches (number {bad[0][0]} first) give it one value a "
            "channel, which "
            "has no variance: in training mode PyTorch raises there",
            {"batches": len(bad)},
            "drop_last=True, or a last batch of two or more; for a map pooled to 1×1, larger batches or no "
            "normalization behind the pool",
            None if left is None else Effect("batches that cannot be normalized", len(bad), left),
        )
    ]


def _as_given(exam: Examination) -> Gap:
    return Gap(exam.observe(exam.model, exam.given, "inference"), exam.came)


def _against_mixed(exam: Examination) -> Effect | None:
    if not exam.is_mixed:
        return None
    before, after = _as_given(exam), exam.gap
    if before.what != after.what or math.isnan(before.value) or math.isnan(after.value):
        return None
    return Effect(before.what, before.value, after.value)


def _sorted(exam: Examination) -> list[Finding]:
    scores = {name: seen.unevenness() for name, seen in exam.came.seen.items()}
    names = [name for name, score in scores.items() if score > SORTED]
    if not names:
        return []
    kinds = [labels_of(batch) for batch in exam.given]
    evidence = (
        f"the means of its batches scatter {scores[names[0]]:.3g} times as much (in variance) as those of "
        "batches "
        "drawn at random would: examples that are alike come together"
    )
    numbers = {"unevenness": scores[names[0]]}
    if all(labels is not None for labels in kinds):
        distinct = sum(len(labels.unique()) for labels in kinds if labels is not None) / len(kinds)
        evidence += f"; {distinct:.1f} classes in a batch on average"
        numbers["classes_in_a_batch"] = distinct
    return [
        Finding(
            "sorted-batches",
            "wrong",
            tuple(names),
            evidence,
            numbers,
            "shuffle the examples (DataLoader(shuffle=True), or within shards)",
            _against_mixed(exam),
        )
    ]


def _small(exam: Examination) -> list[Finding]:
    noise = {
        name: seen.noise(exam.layers[name].eps)
        for name, seen in exam.came.seen.items()
        if not is_frozen(exam.layers[name]) and name not in exam.resting
    }
    names = sorted((name for name, value in noise.items() if value > NOISY), key=lambda name: -noise[name])
    if not names:
        return []
    size = exam.came.seen[names[0]].usual_size
    return [
        Finding(
            "small-batch",
            "risk",
            tuple(names),
            f"batches of {size}: the mean of one is off by {noise[names[0]]:.2g} deviations, and training "
            "normalizes by it",
            {"noise": noise[names[0]], "batch": size},
            "batches of ten or more independent examples a rank; or bn.freeze(model), when fine-tuning",
            _against_mixed(exam),
        )
    ]
