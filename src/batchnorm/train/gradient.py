"""The gradient of a whole batch, out of micro-batches and of the parts that ranks have of them."""

import warnings
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.statistics import CommitHandle, commit_on_step
from batchnorm.train.ranks import Ranks
from batchnorm.train.recipe import InceptionRecipe, Recipe


class LossOf(nn.Module):
    """A network and its loss as one module, which has a gradient even where a rank has no examples.

    Args:
        model: The network.
        recipe: Its precision, and the weight of auxiliary classifiers.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, x: Tensor, labels: Tensor, weight: float) -> Tensor:
        """Mean loss of the examples, times ``weight``; zero for none.

        Args:
            x: Shape (N, …).
            labels: int64, shape (N,).
            weight: Of these examples in the batch.
        """
        recipe = self.recipe
        if not len(x) and not recipe.sync_bn:
            # Nothing to normalize, and yet every parameter takes part, as DDP on the other ranks expects.
            return torch.stack([p.sum() * 0 for p in self.model.parameters()]).sum()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            logits = self.model(x)
        logits = [logits] if isinstance(logits, Tensor) else logits
        if not len(x):
            return torch.stack([each.float().sum() * 0 for each in logits]).sum()
        main, *heads = (nn.functional.cross_entropy(each.float(), labels) for each in logits)
        if heads:
            assert isinstance(recipe, InceptionRecipe)
            main = main + recipe.head_weight * torch.stack(heads).sum()
        return main * weight


class BatchGradient:
    """Leaves in every parameter's ``grad`` that of the mean loss of a step's whole batch.

    On several ranks PyTorch's DDP adds up their parts, weighted by their numbers of examples, after the
    last micro-batch. Buffers stay each rank's own: there is no broadcast.

    Args:
        model: The network, on its device; the same on all ranks.
        optimizer: That steps by the gradient. With micro-batches the running statistics step with it.
        recipe: What the network is trained by.
        ranks: That train it together.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, ranks: Ranks
    ) -> None:
        self.model, self.recipe, self.ranks = model, recipe, ranks
        self._loss: nn.Module = LossOf(model, recipe)
        self._ddp: DistributedDataParallel | None = None
        self._commit: CommitHandle | None = None
        if recipe.accumulate > 1 and recipe.normalize:
            self._commit = commit_on_step(model, optimizer)

    def compute(self, x: Tensor, labels: Tensor, *, step: int, sizes: tuple[int, ...], total: int) -> Tensor:
        """Forward and backward.

        Args:
            x: This rank's examples, micro-batch after micro-batch.
            labels: Theirs.
            step: Counted from 0; with the rank it decides what dropout draws.
            sizes: Examples of each micro-batch.
            total: Examples of the step over all ranks.

        Returns:
            This rank's part of the mean loss: over the ranks they add up to it.
        """
        if sum(sizes) != len(x):
            # A loader that had less than it should: as even as can be.
            sizes = tuple(len(part) for part in torch.arange(len(x)).tensor_split(len(sizes)))
        parts = list(zip(x.split(sizes), labels.split(sizes), strict=True))
        if self.ranks.num == 1:
            return self._accumulate(parts, total)
        if self._ddp is None:
            self._ddp = self._distributed(parts, total, step)
        self._seed(step)
        return self._accumulate(parts, total)

    def _accumulate(self, parts: list[tuple[Tensor, Tensor]], total: int) -> Tensor:
        # DDP divides by the number of ranks.
        ranks, loss = self.ranks.num, torch.zeros((), device=parts[0][0].device)
        for number, (x, labels) in enumerate(parts, start=1):
            alone = self._ddp is None or number == len(parts)
            with nullcontext() if alone else self._ddp.no_sync():
                part = (self._ddp or self._loss)(x, labels, len(x) * ranks / total)
                part.backward()
            loss = part.detach() if len(parts) == 1 else loss + part.detach()
        return loss / ranks if ranks > 1 else loss

    def _distributed(
        self, parts: list[tuple[Tensor, Tensor]], total: int, step: int
    ) -> DistributedDataParallel:
        device = parts[0][0].device
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with warnings.catch_warnings():
            # Its successor came after the oldest PyTorch that is supported, and sends buffers once.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            ddp = DistributedDataParallel(
                self._loss,
                device_ids=[device] if device.type == "cuda" else None,
                process_group=self.ranks.group,
                broadcast_buffers=False,
            )
        # DDP sorts gradients into buckets as they came in the first step, and the order of a sum over
        # ranks depends on its place in the bucket. So that the first step after a start has the same
        # bits as it had in a run that was not stopped, it is taken once in vain.
        self._seed(step)
        for x, labels in parts[-1:]:
            ddp(x, labels, len(x) * self.ranks.num / total).backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        if self._commit is not None:
            self._commit.drop()
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(buffers[name])
        return ddp

    def _seed(self, step: int) -> None:
        """What dropout draws is a function of seed, step and rank: nothing of it has to be saved."""
        mixed = np.random.SeedSequence([self.recipe.seed, step, 2, self.ranks.rank])
        torch.manual_seed(int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1)))
