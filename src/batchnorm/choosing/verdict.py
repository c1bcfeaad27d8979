"""Which candidate to take: from scores alone, pair by pair, or none where they cannot tell."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from batchnorm.paired import Paired

BASELINE = "plain"


@dataclass(frozen=True)
class Verdict:
    """What the scores say.

    Attributes:
        best: The candidate with the best mean; None if all diverged.
        recommended: The same, or None where it cannot be told from "plain".
        tied: Those that cannot be told from the best.
        differences: Of the best to each other, in scores, positive where the best is better.
        pairs_needed: Repetitions that would probably tell the best from "plain", or, if it is told from that
            or is that, from the next; None where no number would, or all is told.
    """

    best: str | None
    recommended: str | None
    tied: tuple[str, ...]
    differences: Mapping[str, Paired]
    pairs_needed: int | None


def judge(scores: Mapping[str, Sequence[float]], higher_is_better: bool, confidence: float) -> Verdict:
    """Compare the best candidate with each of the others, repetition by repetition.

    The interval of each of the n − 1 differences has confidence 1 − (1 − ``confidence``)/(n − 1)
    (Bonferroni), so that all of them hold together with ``confidence``.

    Args:
        scores: By candidate, one for each repetition, all finite; of those that did not diverge.
        higher_is_better: Of scores.
        confidence: Of the verdict.

    Returns:
        A candidate is recommended if it is told from "plain", or if "plain" is not among the candidates;
        "plain" itself, if it is told from all others.
    """
    if not scores:
        return Verdict(None, None, (), {}, None)
    sign = 1 if higher_is_better else -1
    best = max(scores, key=lambda name: sign * math.fsum(scores[name]))
    each = 1 - (1 - confidence) / max(1, len(scores) - 1)
    differences = {
        name: Paired.of([sign * s for s in scores[best]], [sign * s for s in scores[name]], each)
        for name in scores
        if name != best
    }
    tied = tuple(name for name, difference in differences.items() if not difference.is_told_apart)
    undecided = BASELINE in tied or (best == BASELINE and bool(tied))
    nearest = [BASELINE] if BASELINE in tied else sorted(tied, key=lambda name: differences[name].mean)
    return Verdict(
        best,
        None if undecided else best,
        tied,
        differences,
        differences[nearest[0]].pairs_needed() if nearest else None,
    )
