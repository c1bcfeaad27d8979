"""Whether batches are enough, and mixed enough, for the statistics of a domain."""

import math

from batchnorm.statistics.predictions import Predictions

LARGEST_ERROR = 0.25
"""Standard error of a layer's mean, in deviations, above which its statistics are not trusted."""

_CONFIDENCE = 0.99


def mean_error(num_examples: float, prior: float = 0.0) -> float:
    """Standard error of a mean, in deviations of the layer, from so many independent examples.

    For a layer with one sample an example, or whose locations resemble each other wholly; for others it is
    less. A prior of N examples holds the mean back, (N·stored + n·new)/(N + n), and with it its error.
    """
    return math.sqrt(num_examples) / (prior + num_examples) if num_examples else math.inf


def too_few(num_examples: int, num_batches: int, prior: float | None) -> str | None:
    """Why the examples do not determine statistics; ``None`` if they do.

    Args:
        num_examples: In all batches.
        num_batches: Their number.
        prior: Examples that the stored statistics stand for; ``None`` if they are replaced, by a method
            that normalizes each batch by itself.
    """
    fewest = math.ceil(1 / LARGEST_ERROR**2)
    if prior is not None:
        if (error := mean_error(num_examples, prior)) <= LARGEST_ERROR:
            return None
        return (
            f"{num_examples} example(s) with a prior of {prior:g} leave a layer's mean a standard error of "
            f"{error:.2f} deviations, and at most {LARGEST_ERROR} is trusted: give at least {fewest} "
            f"examples, or a prior of at least {math.sqrt(num_examples) / LARGEST_ERROR - num_examples:g}"
        )
    size = num_examples / num_batches
    if size >= fewest:
        return None
    what = f"{num_examples} example(s)" if num_batches == 1 else f"batches of {size:.3g} examples"
    return (
        f"{what} leave a layer's mean a standard error of {mean_error(size):.2f} deviations, and at most "
        f"{LARGEST_ERROR} is trusted, which takes {fewest} examples in each batch: give larger batches, or "
        'method="blended", which weighs few examples against the stored statistics'
    )


def one_sided(found: Predictions) -> str | None:
    """Why the predictions are too one-sided for statistics of a whole domain; ``None`` if they are not."""
    num_classes, favourite = len(found.counts), found.favourite
    if is_one_sided(found.counts):
        return (
            f"{found.counts[favourite]} of {found.num_examples} examples are predicted to be of class "
            f"{favourite}. Either they are: statistics of one class, or mostly one, would be taken for those "
            "of the domain, and the class normalized away. Or the model recognizes nothing in these data, "
            "and adapting may help. Without labels the two cannot be told apart: give batches with all "
            "classes mixed, and trust=True if they are"
        )
    sided = sum(map(is_one_sided, found.batch_counts))
    if 2 * sided > len(found.batch_counts):
        return (
            f"{sided} of {len(found.batch_counts)} batches are of one class each, by their predictions, and "
            f"the {num_classes} classes come one after the other: each batch would be normalized by the "
            "statistics of its class. Shuffle the examples, or give trust=True"
        )
    return None


def is_one_sided(counts: tuple[int, ...]) -> bool:
    """Whether one of K classes has, with a confidence of 99 %, more than (K + 1)/(2K) of the predictions.

    That is half-way from its equal share to all of them. Source of the bound: Clopper & Pearson (1934).
    """
    num, most, limit = sum(counts), max(counts), (len(counts) + 1) / (2 * len(counts))
    # The bound is above the limit if so many or more would come by chance, at the limit, in 1 % of cases.
    chance = sum(_binomial(k, num, limit) for k in range(most, num + 1))
    return num > 0 and chance < 1 - _CONFIDENCE


def _binomial(k: int, n: int, share: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(ways + k * math.log(share) + (n - k) * math.log1p(-share))
