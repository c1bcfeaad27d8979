"""What would make a deployed model wrong, found in the model before anything is written."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import AveragedModel

from batchnorm.data.names import listing
from batchnorm.doctor import diagnose
from batchnorm.layers import Normalization
from batchnorm.statistics.choose import is_settled

ALLOWABLE = ("never-updated", "averaged-weights")
"""Kinds that may be right after all, and that the caller may let through."""

NUM_BATCHES = 16
"""Of the data given, to hold the statistics against."""

_TRAINING_OPS = ("batch_norm", "native_batch_norm", "cudnn_batch_norm", "dropout", "native_dropout")


@dataclass(frozen=True)
class Problem:
    """One reason not to deploy a model as it is.

    Attributes:
        kind: ``training``, ``batch-statistics``, ``not-finite``, ``never-updated``, ``averaged-weights``,
            or a cause that `batchnorm.diagnose` names.
        layers: Where, as paths in the model.
        what: What is wrong.
        cure: What to do.
    """

    kind: str
    layers: tuple[str, ...]
    what: str
    cure: str

    def __str__(self) -> str:
        where = listing([name or "(model)" for name in self.layers])
        return f"{self.kind}: {where}: {self.what}. Cure: {self.cure}"


def problems_of(model: nn.Module, batches: Iterable[Any] | None = None) -> list[Problem]:
    """Everything that is known to make inference wrong; empty for a model that may be deployed.

    Args:
        model: Not changed.
        batches: Data of the kind to serve, as `batchnorm.diagnose` takes them: the running statistics are
            held against them, which shows what no look at the model alone can, such as statistics of
            other weights.
    """
    found = [
        Problem(kind, tuple(names), *_DESCRIBED[kind])
        for kind, names in (
            ("training", [name for name, module in model.named_modules() if _is_training(model, module)]),
            ("batch-statistics", [name for name, layer in _norms(model) if layer.running_mean is None]),
            ("not-finite", _not_finite(model)),
            ("never-updated", [name for name, layer in _norms(model) if _is_initial(layer)]),
            ("averaged-weights", _unsettled(model)),
        )
        if names
    ]
    if batches is not None and all(problem.kind == "averaged-weights" for problem in found):
        # What is measured does not need a record of having been measured.
        diagnosis = diagnose(model, batches, num_batches=NUM_BATCHES)
        found = [
            Problem(finding.cause, finding.layers, finding.evidence, finding.cure)
            for finding in diagnosis.findings
            if finding.level == "wrong"
        ]
    return found


def check(model: nn.Module, batches: Iterable[Any] | None, allow: Collection[str]) -> list[Problem]:
    """The problems that were allowed.

    Raises:
        ValueError: There are others, or something is allowed that cannot be.
    """
    if unknown := [kind for kind in allow if kind not in ALLOWABLE]:
        raise ValueError(f"allow may hold {', '.join(map(repr, ALLOWABLE))}, got {', '.join(unknown)!r}")
    found = problems_of(model, batches)
    refused = [problem for problem in found if problem.kind not in allow]
    if refused:
        raise ValueError("not exported, nothing was written:\n" + "\n".join(f"  {p}" for p in refused))
    return found


def check_program(program: Any) -> None:
    """Refuse an exported graph that normalizes by the batch, or drops out.

    The modes of modules do not tell of a forward that calls `torch.nn.functional` itself.

    Raises:
        ValueError: It does; the message names operator and layer.
    """
    for node in program.graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        name = node.target._schema.name.removeprefix("aten::").lstrip("_")
        if not name.startswith(_TRAINING_OPS):
            continue
        given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))
        if {**given, **node.kwargs}.get("training", given.get("train")) is True:
            raise ValueError(
                f"not exported, nothing was written:\n  training: {where(node)}: its forward calls {name} in "
                "training mode whatever the mode of the model. Cure: pass training=self.training there"
            )


def where(node: Any) -> str:
    """The path of the innermost module whose forward made a node of an exported graph."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    # As L['self']._modules['a'] it is written by the strict tracer only.
    return stack[-1] if stack and stack[-1] else "(model)"


def _norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _is_training(model: nn.Module, module: nn.Module) -> bool:
    if isinstance(module, Normalization) and module.frozen:
        return False
    # The flag of a wrapper for averaged weights says nothing about the network in it.
    counts = isinstance(module, _BatchNorm | _DropoutNd) or module is model
    return module.training and counts and not isinstance(module, AveragedModel)


def _is_initial(layer: _BatchNorm) -> bool:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return False
    return bool((mean == 0).all() and (var == 1).all())


def _not_finite(model: nn.Module) -> list[str]:
    found = []
    for name, module in model.named_modules():
        tensors: dict[str, Tensor] = {
            **dict(module.named_parameters(recurse=False)),
            **dict(module.named_buffers(recurse=False)),
        }
        bad = [key for key, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        var = tensors.get("running_var")
        if var is not None and not bad and bool((var < 0).any()):
            bad = ["running_var"]
        found += [f"{name}.{key}" if name else key for key in bad]
    return found


def _unsettled(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, AveragedModel)
        and int(module.n_averaged) > 0
        and any(isinstance(m, _BatchNorm) for m in module.modules())
        and not is_settled(module)
    ]


_DESCRIBED = {
    "training": (
        "in training mode, where outputs depend on the other examples of a batch and on chance",
        "model.eval()",
    ),
    "batch-statistics": (
        "no running statistics, so that each example's output depends on the others of its batch",
        "build the layer with track_running_stats=True, then bn.recalibrate(model, batches)",
    ),
    "not-finite": (
        "holds NaN or infinity, or a variance below zero",
        "bn.recalibrate(model, batches) for statistics; an older checkpoint for weights",
    ),
    "never-updated": (
        "running statistics are still the initial ones, mean 0 and variance 1: the model was never trained, "
        "or weights were loaded without them",
        "train it, load the state dict with its buffers, or bn.recalibrate(model, batches); "
        'allow=["never-updated"] if it is meant so',
    ),
    "averaged-weights": (
        "the weights are an average, and their statistics belong to others: none were measured since the "
        "last update of the average",
        "bn.recalibrate(averaged, batches) after the last update; batches= here, to measure whether they "
        'fit; or allow=["averaged-weights"] if another program has settled them',
    ),
}
