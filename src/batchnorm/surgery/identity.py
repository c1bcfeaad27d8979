"""Proof that new layers change a network by nothing but what they are there for."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from batchnorm.surgery.graph import is_leaf
from batchnorm.surgery.install import Site
from batchnorm.surgery.models import copied
from batchnorm.surgery.proof import allowed, largest_difference, learning, roundoff_of, widened


def prove(
    model: nn.Module,
    new: nn.Module,
    args: Sequence[Any],
    sites: Sequence[Site],
    removed: Sequence[str],
    rewritten: bool,
) -> tuple[float, list[str]]:
    """Set the new layers to do nothing but add the removed biases: the outputs must not change.

    They are compared in evaluation, and with the forwards' way of training while the layers stand
    still. Biases whose removal alone makes the difference are given back to ``new``.

    Args:
        model: The original.
        new: With the layers; changes only where a bias is given back.
        args: Example.
        sites: Of the layers, with their paths.
        removed: Paths of the affine layers whose biases were removed.
        rewritten: Whether a forward was rewritten.

    Returns:
        The largest difference relative to the largest output, and the paths of the biases given back.

    Raises:
        RuntimeError: The outputs differ, or other parameters learn.
    """
    old, old_args = widened(model, args, nn.Module.eval)

    def doing_nothing(dead: Sequence[str]) -> nn.Module:
        candidate = copied(new)
        _give_back(candidate, model, set(removed) - set(dead))
        if roundoff_of(old) != roundoff_of(model):
            candidate.double()
        for site in sites:
            layer = candidate.get_submodule(site.path)
            affine = site.place.affine.meta["call"].path
            layer.running_var.fill_(1 - layer.eps)
            if affine in dead:
                layer.running_mean.copy_(-model.get_submodule(affine).bias.detach())
        return candidate

    def miss(dead: Sequence[str]) -> float:
        return largest_difference(old, doing_nothing(dead), old_args, (nn.Module.eval, leaves_in_training))

    dead = list(removed)
    worst = miss(dead)
    if not worst <= allowed(old) and dead:
        # The traces are of training; evaluation may look at a value that training does not.
        dead = [path for path in removed if miss([path]) <= allowed(old)]
        worst = miss(dead)
    if not worst <= allowed(old):
        raise RuntimeError(
            f"with its new layers set to the identity the model differs from the original by {worst:.1e} of "
            f"its largest output, so something in its forward was not understood; narrow the change down "
            f"with only= or except_=, and please report the model"
        )
    if rewritten:
        _check_learning(old, doing_nothing(dead), old_args)
    needed = [path for path in removed if path not in dead]
    _give_back(new, model, needed)
    return worst, needed


def _give_back(new: nn.Module, model: nn.Module, paths: Sequence[str] | set[str]) -> None:
    for path in paths:
        new.get_submodule(path).register_parameter("bias", copy.deepcopy(model.get_submodule(path).bias))


def _check_learning(old: nn.Module, candidate: nn.Module, args: Sequence[Any]) -> None:
    # Contexts such as torch.no_grad() leave no mark in a traced graph, nor in the outputs.
    both = {name for name, _ in old.named_parameters()} & {name for name, _ in candidate.named_parameters()}
    odd = (learning(old, args) ^ learning(candidate, args)) & both
    if odd:
        raise RuntimeError(
            f"with its new layers the model learns other parameters than before ({', '.join(sorted(odd))}): "
            f"a rewritten forward has lost a torch.no_grad() or the like; leave it alone with except_="
        )


def leaves_in_training(model: nn.Module) -> None:
    """Training mode for the user's own forwards, evaluation mode for the layers they call.

    The user's code so takes its way of training, while dropout and normalization stand still.
    """
    for module in model.modules():
        module.training = not is_leaf(module)
