"""A recipe: everything that decides the outcome of a training run, except the data."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from batchnorm.data import Shuffle

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127

LATER: dict[str, Any] = {"accumulate": 1, "batch_per_rank": False, "sync_bn": False}
"""What recipe.json lacks of runs that were begun before there were these fields: as they were trained."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a network: what all of them share. Frozen: `dataclasses.replace` makes a variant."""

    kinds: ClassVar[dict[str, "type[Recipe]"]] = {}
    """Kinds of recipes by the network that they train."""

    model: str
    """Network."""
    normalize: bool = False
    """Put Batch Normalization directly before each nonlinearity (Algorithm 2)."""
    batch_size: int = 60
    """Examples in one step, over all ranks: their number changes nothing (unless batch_per_rank)."""
    batch_per_rank: bool = False
    """Take batch_size for that of each rank, so that n ranks learn from n times as many examples a step."""
    accumulate: int = 1
    """Micro-batches of a step, computed one after the other to save memory: the gradient is that of the whole
    batch; Batch Normalization takes the moments of each, and its running statistics move once."""
    sync_bn: bool = False
    """Normalize by the moments of the batch over all ranks instead of each rank's own part."""
    steps: int = 50_000
    """Steps of the whole training."""
    optimizer: Literal["sgd", "adagrad", "adam"] = "sgd"
    """Update rule."""
    learning_rate: float = 0.1
    """Step size at the start."""
    rate_decay: float = 1.0
    """Factor on the step size at every `decay_every` steps; 1 leaves it the same throughout."""
    decay_every: int = 1
    """Steps between two such factors."""
    momentum: float = 0.0
    """Momentum of sgd, from 0 to below 1; adagrad and adam have none to set."""
    weight_decay: float = 0.0
    """L2 penalty that the optimizer adds to the gradient of every parameter, per unit of weight."""
    shuffle: Shuffle = "all"
    """What has another order in each epoch: all examples, or by shards as images are stored at scale."""
    shard_size: int = 1000
    """Examples in a shard, for data that are not stored in shards; of no account where shuffle is all."""
    seed: int = 0
    """Decides the initial weights, the order of examples and every other random number."""
    log_every: int = 100
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between two evaluations on the test set (a checkpoint and the last step bring one too)."""
    eval_examples: int = 0
    """Test examples in evaluations on the way, always the first ones; 0 takes all, as that of the finished
    model always does."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    recalibrate_examples: int = 6000
    """Training examples that give the population statistics for an evaluation; 0 takes all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU when there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of convolutions and matrix products while training (torch.autocast); weights, statistics and
    evaluations are float32 either way."""
    threads: int = 0
    """CPU threads of PyTorch; 0 leaves its own choice. Results are bit-identical only for the same number."""

    def __init_subclass__(cls) -> None:
        Recipe.kinds[cls.__dict__["model"]] = cls

    def __post_init__(self) -> None:
        if type(self) is Recipe:
            raise TypeError(f"Recipe itself trains nothing: use one of {', '.join(Recipe.kinds)}.")
        for name, kind in typing.get_type_hints(type(self)).items():
            if typing.get_origin(kind) is not ClassVar:
                _check_type(name, kind, getattr(self, name))
        for name in (
            "batch_size",
            "accumulate",
            "steps",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "decay_every",
            "shard_size",
        ):
            self.require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "recalibrate_examples", "eval_examples", "threads"):
            self.require(name, getattr(self, name) >= 0, "0 or more")
        self.require("weight_decay", 0 <= self.weight_decay < float("inf"), "finite and 0 or more")
        self.require("learning_rate", 0 < self.learning_rate <= MAX_FLOAT32, "above 0 and within float32")
        self.require("rate_decay", 0 < self.rate_decay <= 1, "above 0 and at most 1")
        self.require("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        self.require(
            "momentum",
            self.momentum == 0 or self.optimizer == "sgd",
            f"0 with {self.optimizer}, which would not use it",
        )
        self.require(
            "batch_size",
            self.batch_size >= 2 or not self.normalize,
            "at least 2 with normalize, as one example has no variance",
        )
        self.require(
            "accumulate",
            self.accumulate * (2 if self.normalize else 1) <= self.batch_size,
            f"small enough for {'two examples' if self.normalize else 'an example'} in each micro-batch of "
            f"{self.batch_size} in all",
        )
        self.require("sync_bn", self.normalize or not self.sync_bn, "false without normalize")

    def require(self, name: str, holds: bool, needed: str) -> None:
        """Raise a ValueError that says what field ``name`` must be, unless it ``holds``."""
        _check(holds, name, needed, getattr(self, name))

    def rate_at(self, step: int) -> float:
        """Step size of a step, counted from 0."""
        return self.learning_rate * self.rate_decay ** (step // self.decay_every)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` takes them back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Recipe":
        """The recipe that `to_json` wrote, of the kind that its ``model`` says.

        Fields in `LATER` may be missing.

        Raises:
            ValueError: A field is missing or unknown, or its value is not allowed.
        """
        kind = cls.kinds.get(str(values.get("model")))
        if kind is None:
            raise ValueError(
                f"The recipe's model is {values.get('model')!r}; this version knows {', '.join(cls.kinds)}."
            )
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"The recipe has fields that this version does not know: {', '.join(unknown)}. "
                f"Known are {', '.join(sorted(known))}; use the version that wrote it."
            )
        values = LATER | dict(values)
        if missing := sorted(known - set(values)):
            raise ValueError(f"The recipe lacks {', '.join(missing)}; use the version that wrote it.")
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    @classmethod
    def from_older_json(cls, values: Mapping[str, Any]) -> "Recipe":
        """Like `from_json`; fields that came later than ``values`` get their defaults."""
        kind = cls.kinds.get(str(values.get("model")), cls)
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(kind)
            if field.default is not dataclasses.MISSING
        }
        return cls.from_json({**defaults, **values})

    def differences(self, other: "Recipe") -> list[str]:
        """Fields that differ, each as `name (asked for mine, there other's)`."""
        mine, theirs = self.to_json(), other.to_json()
        return [
            f"{name} (asked for {mine.get(name)!r}, there {theirs.get(name)!r})"
            for name in mine | theirs
            if mine.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True, kw_only=True)
class MLPRecipe(Recipe):
    """How to train the fully connected network of section 4.1."""

    model: Literal["mlp"] = "mlp"
    """Network: mlp is the fully connected one of the paper's section 4.1."""
    hidden: tuple[int, ...] = (100, 100, 100)
    """Units of each hidden layer."""
    activation: Literal["sigmoid", "tanh", "relu"] = "sigmoid"
    """Nonlinearity of the hidden layers."""
    init_std: float = 0.1
    """Standard deviation of the initial Gaussian weights."""
    binarize: bool = True
    """Feed black or white (threshold 128 of 255), as section 4.1 does; otherwise grey levels from 0 to 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("init_std", 0 <= self.init_std < float("inf"), "finite and 0 or more")
        self.require(
            "hidden", len(self.hidden) >= 1 and min(self.hidden) >= 1, "one or more sizes of at least 1"
        )


@dataclass(frozen=True, kw_only=True)
class InceptionRecipe(Recipe):
    """How to train the Inception network of section 4.2."""

    model: Literal["inception"] = "inception"
    """Network: inception is that of the paper's section 4.2."""
    activation: Literal["relu", "sigmoid"] = "relu"
    """Nonlinearity."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """How images become the first module's input: strides of 8 in all, or of 2 for 32×32 images."""
    image_size: int = 224
    """Pixels on a side of what the network sees."""
    width: float = 1.0
    """Multiplies every number of channels."""
    projection: Literal[96, 128] = 96
    """Channels of the pool projections of 4c and 4d; the paper prints 128, which contradicts its sums."""
    separable: bool = True
    """First convolution depthwise (8 outputs for each colour), then pointwise; else a full one."""
    heads: int = 0
    """Auxiliary classifiers while training, 0 to 2."""
    head_weight: float = 0.3
    """Weight of each auxiliary classifier's loss, as in GoogLeNet."""
    response_norm: bool = False
    """Local response normalization in the stem."""
    dropout: float = 0.0
    """Share of the features dropped before the softmax."""
    per_activation: bool = False
    """In the last module, γ, β and statistics for every activation (section 3.2)."""
    init_scale: float = 1.0
    """Multiplies the initial weights of the convolutions."""
    crops: Literal["area", "shift", "none"] = "area"
    """Training crops: of 8 to 100 % of the area and aspect ratio 3/4 to 4/3; or moved by an eighth of the
    side; or the image as it is."""
    mirror: bool = True
    """Mirror every second training image."""
    distortion: float = 1.0
    """Strength of the photometric distortion of training images; 0 has none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("heads", 0 <= self.heads <= 2, "0, 1 or 2")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        for name in ("width", "init_scale"):
            self.require(name, 0 < getattr(self, name) < float("inf"), "above 0")
        for name in ("distortion", "head_weight"):
            self.require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self.require("image_size", self.image_size >= 8, "8 or more pixels")
        self.require("per_activation", self.normalize or not self.per_activation, "false without normalize")


def _check_type(name: str, kind: Any, value: Any) -> None:
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        _check(value in allowed, name, f"one of {', '.join(map(str, allowed))}", value)
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
