"""A recipe: everything that decides the outcome of a training run, except the data."""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train one network. Frozen: `dataclasses.replace` makes a variant."""

    model: Literal["mlp"] = "mlp"
    """Network: mlp is the fully connected one of the paper's section 4.1."""
    hidden: tuple[int, ...] = (100, 100, 100)
    """Units of each hidden layer."""
    activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid"
    """Nonlinearity of the hidden layers."""
    init_std: float = 0.1
    """Standard deviation of the initial Gaussian weights."""
    normalize: bool = False
    """Put Batch Normalization directly before each nonlinearity (Algorithm 2)."""
    binarize: bool = True
    """Feed black or white (threshold 128 of 255), as section 4.1 does; otherwise grey levels from 0 to 1."""
    batch_size: int = 60
    """Examples in one step."""
    steps: int = 50_000
    """Steps of the whole training."""
    optimizer: Literal["sgd", "adagrad", "adam"] = "sgd"
    """Update rule."""
    learning_rate: float = 0.1
    """Step size, the same throughout."""
    momentum: float = 0.0
    """Momentum of sgd, from 0 to below 1; adagrad and adam have none to set."""
    weight_decay: float = 0.0
    """L2 penalty that the optimizer adds to the gradient of every parameter, per unit of weight."""
    seed: int = 0
    """Decides the initial weights, the order of examples and every other random number."""
    log_every: int = 100
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between two evaluations on the test set (a checkpoint and the last step bring one too)."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    recalibrate_examples: int = 6000
    """Training examples that give the population statistics for an evaluation; 0 takes all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    threads: int = 0
    """CPU threads of PyTorch; 0 leaves its own choice. Results are bit-identical only for the same number."""

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self)).items():
            _check_type(name, kind, getattr(self, name))
        for name in ("batch_size", "steps", "log_every", "eval_every", "checkpoint_every"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("seed", "recalibrate_examples", "threads"):
            _check(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("init_std", "weight_decay"):
            _check(0 <= getattr(self, name) < float("inf"), name, "finite and 0 or more", getattr(self, name))
        _check(
            0 < self.learning_rate <= MAX_FLOAT32,
            "learning_rate",
            "above 0 and within float32",
            self.learning_rate,
        )
        _check(0 <= self.momentum < 1, "momentum", "at least 0 and below 1", self.momentum)
        _check(
            self.momentum == 0 or self.optimizer == "sgd",
            "momentum",
            f"0 with {self.optimizer}, which would not use it",
            self.momentum,
        )
        _check(
            len(self.hidden) >= 1 and min(self.hidden) >= 1,
            "hidden",
            "one or more sizes of at least 1",
            self.hidden,
        )
        _check(
            self.batch_size >= 2 or not self.normalize,
            "batch_size",
            "at least 2 with normalize, as one example has no variance",
            self.batch_size,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` takes them back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_json` wrote.

        Raises:
            ValueError: A field is missing or unknown, or its value is not allowed.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"The recipe has fields that this version does not know: {', '.join(unknown)}. "
                f"Known are {', '.join(sorted(known))}; use the version that wrote it."
            )
        if missing := sorted(known - set(values)):
            raise ValueError(f"The recipe lacks {', '.join(missing)}; use the version that wrote it.")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def differences(self, other: "Recipe") -> list[str]:
        """Fields that differ, each as `name (asked for mine, there other's)`."""
        mine, theirs = self.to_json(), other.to_json()
        return [
            f"{name} (asked for {mine[name]!r}, there {theirs[name]!r})"
            for name in mine
            if mine[name] != theirs[name]
        ]


def mlp() -> Recipe:
    """Section 4.1 without Batch Normalization: 3×100 sigmoids, binary input, 60 a batch, 50,000 steps.

    The paper gives neither learning rate nor initial scale: plain SGD at 0.1 and a deviation of 0.1
    are this project's choice.
    """
    return Recipe(threads=1)  # A network this small gains nothing from a second thread.


def bn_mlp() -> Recipe:
    """Section 4.1 with Batch Normalization on each hidden layer, and nothing else changed."""
    return dataclasses.replace(mlp(), normalize=True)


RECIPES: dict[str, Callable[[], Recipe]] = {"mlp": mlp, "bn-mlp": bn_mlp}
"""Recipes by the name that the command line uses."""


def get_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: No such recipe; the message lists those there are.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"Unknown recipe {name!r}; known are {', '.join(RECIPES)}.{hint}")
    return RECIPES[name]()


def _check_type(name: str, kind: Any, value: Any) -> None:
    if typing.get_origin(kind) is Literal:
        _check(value in typing.get_args(kind), name, f"one of {', '.join(typing.get_args(kind))}", value)
    elif kind is float:
        _check(isinstance(value, int | float) and not isinstance(value, bool), name, "a number", value)
    elif kind is bool:
        _check(isinstance(value, bool), name, "true or false", value)
    elif kind is int:
        _check(_is_integer(value), name, "an integer", value)
    else:
        _check(isinstance(value, tuple) and all(map(_is_integer, value)), name, "a tuple of integers", value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(holds: bool, name: str, needed: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"Recipe.{name} must be {needed}; got {value!r}.")
