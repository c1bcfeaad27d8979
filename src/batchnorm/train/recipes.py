"""The recipes: the paper's experiments by name, at its own scale and at that of CIFAR-10."""

import difflib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from batchnorm.train.recipe import InceptionRecipe, MLPRecipe, Recipe

Scale = Literal["imagenet", "cifar10"]

STEPS_PER_EPOCH = 1_281_167 // 32
"""Of ImageNet's training images, in mini-batches of 32."""
STEPS_INCEPTION, STEPS_BASELINE, STEPS_ACCELERATED = 31_000_000, 20_000_000, 6_000_000
"""The first and the last are those at which the paper has the best of plain Inception and of BN-x30. How long
BN-Baseline was trained it does not say; it needs 13.3 million for plain Inception's best."""
CIFAR10_STEPS, CIFAR10_STEPS_PER_EPOCH = 2000, 50_000 // 32
"""By how much `--scale cifar10` divides the steps of a training, and its steps in an epoch."""


def mlp() -> MLPRecipe:
    """Section 4.1 without Batch Normalization: 3×100 sigmoids, binary input, 60 a batch, 50,000 steps.

    The paper gives neither learning rate nor initial scale: plain SGD at 0.1 and a deviation of 0.1
    are this project's choice.
    """
    return MLPRecipe(threads=1)  # A network this small gains nothing from a second thread.


def bn_mlp() -> MLPRecipe:
    """Section 4.1 with Batch Normalization on each hidden layer, and nothing else changed."""
    return replace(mlp(), normalize=True)


def inception() -> InceptionRecipe:
    """Section 4.2's baseline, without Batch Normalization: rate 0.0015, dropout, response normalization.

    Momentum, the decay of the rate (×0.96 every 8 epochs) and response normalization are
    GoogLeNet's. The paper has L2 on the parameters and does not say how much: 4e-5 is what ports by the
    authors' employer use.
    """
    return InceptionRecipe(
        batch_size=32,
        steps=STEPS_INCEPTION,
        learning_rate=0.0015,
        momentum=0.9,
        rate_decay=0.96,
        decay_every=8 * STEPS_PER_EPOCH,
        weight_decay=4e-5,
        shuffle="shards",
        dropout=0.4,
        response_norm=True,
        log_every=1000,
        eval_every=40_000,
        checkpoint_every=10_000,
        recalibrate_examples=12_800,
    )


def bn_baseline() -> InceptionRecipe:
    """Section 4.2.2: Batch Normalization before each nonlinearity, and nothing else changed."""
    return replace(inception(), normalize=True, steps=STEPS_BASELINE)


def bn_x5() -> InceptionRecipe:
    """Section 4.2.1: all the changes, five times the baseline rate."""
    return replace(_accelerated(), learning_rate=5 * inception().learning_rate)


def bn_x30() -> InceptionRecipe:
    """Section 4.2.2: as bn-x5, thirty times the baseline rate."""
    return replace(_accelerated(), learning_rate=30 * inception().learning_rate)


def bn_x5_sigmoid() -> InceptionRecipe:
    """Section 4.2.2: as bn-x5, sigmoid in place of ReLU."""
    return replace(bn_x5(), activation="sigmoid")


ENSEMBLE: tuple[dict[str, Any], ...] = (
    {"init_scale": 1.5},
    {"dropout": 0.05},
    {"dropout": 0.1},
    {"per_activation": True},
    {"init_scale": 1.5, "dropout": 0.05},
    {"init_scale": 1.5, "dropout": 0.1, "per_activation": True},
)
"""What each of the six members changes of bn-x30. The paper names the kinds of changes and the shares of
dropout, but neither who has which nor how much larger the weights are."""


def ensemble(member: int) -> InceptionRecipe:
    """Section 4.2.3: bn-x30 with the changes of one of the six members, counted from 1; its own seed."""
    return replace(bn_x30(), **ENSEMBLE[member - 1], seed=member)


def _accelerated() -> InceptionRecipe:
    baseline = bn_baseline()
    return replace(
        baseline,
        steps=STEPS_ACCELERATED,
        dropout=0.0,
        weight_decay=baseline.weight_decay / 5,
        decay_every=baseline.decay_every // 6,
        response_norm=False,
        shuffle="shards+within",
        distortion=0.5,
    )


def at_scale(recipe: Recipe, scale: Scale) -> Recipe:
    """A recipe for ImageNet as it is, or with what CIFAR-10 forces to change.

    Images of 32 pixels need another first convolution, and crops that leave something to recognize. A
    quarter of the width and one step for 2,000 are what two cores can train in hours. The rate
    decays after as many epochs as on ImageNet. Rates, batch size, L2, dropout, distortion and
    everything else stay.
    """
    if scale == "imagenet" or not isinstance(recipe, InceptionRecipe):
        return recipe
    return replace(
        recipe,
        stem="cifar",
        image_size=32,
        width=0.25,
        crops="shift",
        steps=recipe.steps // CIFAR10_STEPS,
        decay_every=round(recipe.decay_every / STEPS_PER_EPOCH * CIFAR10_STEPS_PER_EPOCH),
        log_every=50,
        eval_every=250,
        checkpoint_every=1000,
        eval_examples=4000,
        recalibrate_examples=640,
        threads=1,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "mlp": mlp,
    "bn-mlp": bn_mlp,
    "inception": inception,
    "bn-baseline": bn_baseline,
    "bn-x5": bn_x5,
    "bn-x30": bn_x30,
    "bn-x5-sigmoid": bn_x5_sigmoid,
    **{f"ensemble-{member}": partial(ensemble, member) for member in range(1, 7)},
}
"""Recipes by the name that the command line uses."""


def get_recipe(name: str, scale: Scale = "imagenet") -> Recipe:
    """The recipe of that name.

    Args:
        name: One of `RECIPES`.
        scale: As in `at_scale`; of no account for the fully connected networks.

    Raises:
        ValueError: No such recipe; the message lists those there are.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"Unknown recipe {name!r}; known are {', '.join(RECIPES)}.{hint}")
    return at_scale(RECIPES[name](), scale)
