"""The training loop: one for CPU and GPU, and one that a killed process takes up where it was."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm import files
from batchnorm.train.build import build_model, build_optimizer, process_settings, resolve_device
from batchnorm.train.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    optimizer_state,
    prune,
    restore_optimizer,
    save_checkpoint,
    share_checkpoint,
    share_state,
    to_safetensors,
)
from batchnorm.train.evaluate import Scores, score
from batchnorm.train.feed import Data, Feed, feed_of
from batchnorm.train.gradient import BatchGradient
from batchnorm.train.metrics import MetricsLog, ProgressReport, cut_metrics
from batchnorm.train.predictions import predict
from batchnorm.train.ranks import ALONE, RankLost, Ranks
from batchnorm.train.recipe import Recipe
from batchnorm.train.run import (
    CHECKPOINTS,
    METRICS_FILE,
    MODEL_FILE,
    TENSORBOARD,
    data_facts,
    image_shape,
    load_model,
    open_run,
)
from batchnorm.train.statistics import LocalStatistics, with_population_statistics
from batchnorm.train.stop import SIGNALS, TrainingStopped, stop_requests


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run ends with."""

    out: Path
    """The run's folder."""
    model: nn.Module
    """The network with population statistics, in evaluation mode, on the training device."""
    scores: Scores
    """Its result on the test set."""
    bad_images: tuple[str, ...] = ()
    """Names of images that could not be decoded and were left out, and why."""


def train(
    recipe: Recipe,
    data: Data,
    out: str | Path,
    *,
    progress: bool = True,
    tensorboard: bool = True,
    num_workers: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> TrainingResult:
    """Train by a recipe, from the start or from where a run in `out` stopped.

    A run that was stopped, or killed at any instant, ends with the same bits as one that was not, on
    the same machine with the same versions and threads (on a GPU as far as its kernels are
    deterministic). A finished run is evaluated once more and returned.

    Where `torch.distributed` has a default process group, its ranks train together: call this on all of
    them, with the same arguments (and on GPUs after `torch.cuda.set_device`). Rank 0 alone reads and
    writes `out`. They compute what one process computes, up to rounding; see docs/distributed.md.

    Args:
        recipe: How to train.
        data: On what.
        out: Folder of the run; docs/training.md tells what it holds.
        progress: Report on standard error.
        tensorboard: Write TensorBoard events beside metrics.jsonl.
        num_workers: Processes that decode images on disk, of each rank; None is one for each core but one,
            shared with other ranks of the machine, and 0 decodes in this process. Of no account for data in
            memory, and never for the result.
        on_step: Called after each step with the number of steps taken so far.

    Returns:
        The model and its result.

    Raises:
        ValueError: Recipe and data do not fit, or `out` holds something else.
        BlockingIOError: Another process trains in `out`.
        FloatingPointError: The loss or a weight is no longer finite; the last checkpoint is.
        TrainingStopped: SIGTERM or Ctrl-C came, to any rank; the step was finished and saved.
        OSError: The disk refused; earlier checkpoints are whole.
        RankLost: Another rank ended or did not answer.
    """
    device, ranks, folder = resolve_device(recipe.device), Ranks.here(), Path(out)
    with ranks.contact(), ExitStack() as stack:
        with ranks.together():
            feed = feed_of(recipe, data, device, num_workers, ranks)
            facts = data_facts(data, recipe)
        _check_alike(ranks, {"recipe": recipe.to_json(), "data": facts})
        stack.enter_context(process_settings(recipe, device))
        ranks.lead(lambda: stack.enter_context(open_run(folder, recipe, data, device, num_ranks=ranks.num)))
        with ranks.together():
            trainer = _Trainer(recipe, data, feed, folder, device, ranks)
        if not trainer.is_finished():
            trainer.resume()
            trainer.run(progress=progress, tensorboard=tensorboard, on_step=on_step)
        return trainer.finished()


def _check_alike(ranks: Ranks, facts: dict[str, Any]) -> None:
    if ranks.num == 1:
        return
    # A checksum may differ for nothing but the place of the data, which is no fault.
    facts["data"] = {name: value for name, value in facts["data"].items() if name != "name"}
    every = ranks.gather(facts)
    for rank, other in enumerate(every):
        for part in facts:
            differ = [name for name, value in every[0][part].items() if other[part].get(name) != value]
            if differ:
                error = ValueError(
                    f"Ranks must be given the same {part}, and rank {rank} differs from rank 0 in "
                    f"{', '.join(differ)}: give the same command, and the same files, on every machine."
                )
                raise ranks.once(error)


class _Trainer:
    """Everything that changes from step to step, and what it takes to save and restore it."""

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        feed: Feed,
        folder: Path,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.feed, self.folder, self.device, self.ranks = recipe, feed, folder, device, ranks
        self.model = build_model(recipe, image_shape(recipe, data), len(data.classes)).to(device)
        self.optimizer = build_optimizer(recipe, self.model)
        self.gradient = BatchGradient(self.model, self.optimizer, recipe, ranks)
        self.local = LocalStatistics(self.model, ranks)
        # Losses since the last row of metrics, of this rank's part; read together, as each reading would
        # halt a GPU.
        self.losses = torch.zeros(recipe.log_every, device=device)
        self.num_losses = 0
        self.step = 0
        self.saved_step = -1
        self.seconds = 0.0

    def is_finished(self) -> bool:
        """Whether the folder has the finished model."""
        exists = json.dumps((self.folder / MODEL_FILE).exists()).encode()
        return bool(json.loads(self.ranks.broadcast(exists)))

    def resume(self) -> None:
        """Take over the newest whole checkpoint, if any, and forget what was reported after it."""
        found = self.ranks.lead(lambda: newest_checkpoint(self.folder / CHECKPOINTS))
        checkpoint = share_checkpoint(self.ranks, found)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint.model)
            tensors, facts = checkpoint.training, checkpoint.facts
            self.local.restore(tensors)
            restore_optimizer(self.optimizer, tensors, facts["optimizer"])
            torch.set_rng_state(tensors["rng.cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
            self.num_losses = len(tensors["losses"])
            if self.ranks.is_first:
                self.losses[: self.num_losses] = tensors["losses"].to(self.device)
            self.step = self.saved_step = checkpoint.step
            self.seconds = facts["seconds"]
        self.ranks.lead(lambda: cut_metrics(self.folder / METRICS_FILE, self.step))

    def run(self, *, progress: bool, tensorboard: bool, on_step: Callable[[int], None] | None = None) -> None:
        """Take the remaining steps, with evaluations and checkpoints where they are due."""
        recipe, ranks = self.recipe, self.ranks
        self._began = time.perf_counter() - self.seconds
        events = self.folder / TENSORBOARD if tensorboard else None
        with ExitStack() as stack:
            log: MetricsLog | None = ranks.lead(
                lambda: stack.enter_context(
                    closing(MetricsLog(self.folder / METRICS_FILE, events, self.step))
                )
            )
            with ranks.together():
                report = ProgressReport(recipe.steps, self.step, shown=progress and ranks.is_first)
            stack.enter_context(report)
            requests = stack.enter_context(stop_requests())
            batches = self.feed.training(self.step)
            while self.step < recipe.steps:
                self._next_batch(batches, requests, log)
                self._take_step()
                self.step += 1
                report.step(self.step)
                if on_step is not None:
                    on_step(self.step)
                saves = self.step == recipe.steps or self.step % recipe.checkpoint_every == 0
                evaluates = saves or self.step % recipe.eval_every == 0
                row: dict[str, float] = {}
                if evaluates or self.step % recipe.log_every == 0:
                    row = self._report(log, report, evaluate=evaluates)
                if saves:
                    self._save(log, row.get("accuracy"))

    def _next_batch(
        self, batches: Iterator[tuple[Tensor, Tensor]], requests: list[int], log: MetricsLog | None
    ) -> None:
        """Have a batch for the next step, or stop, or fail: all ranks the same."""
        error: Exception | None = None
        try:
            self._batch = next(batches)
        except StopIteration:
            error = RuntimeError(
                f"the batches of rank {self.ranks.rank} of {self.ranks.num} ended after {self.step} of "
                f"{self.recipe.steps} steps"
            )
        except Exception as caught:
            error = caught
        num_mine = 0 if error is not None else len(self._batch[1])
        try:
            agreed = self.ranks.before_step(num_mine, requests, SIGNALS, error)
        except RankLost:
            raise
        except Exception:
            # What was learned is good; only what comes next is missing.
            if self.step > max(self.saved_step, 0):
                self._save(log, None)
            raise
        if agreed.signal_number is not None:
            if self.step != self.saved_step:
                self._save(log, None)
            raise self.ranks.once(TrainingStopped(agreed.signal_number, self.step, self.folder))
        self._num_examples = agreed.num_examples

    def finished(self) -> TrainingResult:
        """Write the model with population statistics, or read it if it is there, and evaluate it."""
        path = self.folder / MODEL_FILE
        if self.is_finished():
            self.ranks.lead(lambda: load_model(self.folder, self.model))
            share_state(self.ranks, self.model)
            model = self.model.eval()
        else:
            model = self._with_statistics()
            # One entry only: safetensors writes several in random order, and equal runs shall be equal files.
            step = {"step": str(self.step)}
            self.ranks.lead(lambda: files.write_bytes(path, to_safetensors(model.state_dict(), step)))
        scores = self._scores(model)
        bad = {name: None for names in self.ranks.gather(self.feed.bad_images) for name in names}
        return TrainingResult(self.folder, model, scores, tuple(bad))

    def _take_step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        self.optimizer.zero_grad()
        loss = self.gradient.compute(
            *self._batch, step=self.step, sizes=self.feed.share.sizes, total=self._num_examples
        )
        self.optimizer.step()
        self.losses[self.num_losses] = loss
        self.num_losses += 1

    def _report(self, log: MetricsLog | None, report: ProgressReport, *, evaluate: bool) -> dict[str, float]:
        losses = self._finite_losses()
        self.num_losses = 0
        row: dict[str, float] = {"step": self.step, "loss": losses.double().mean().item()}
        if evaluate:
            self._require_finite_weights()
            scores = self._scores(self._with_statistics(), self.recipe.eval_examples)
            row |= {"accuracy": scores.top1, "test_loss": scores.loss}
        row["seconds"] = round(time.perf_counter() - self._began, 3)
        self.ranks.lead(lambda: log.write(row))
        report.row(row)
        return row

    def _save(self, log: MetricsLog | None, accuracy: float | None) -> None:
        losses = self._finite_losses()
        self._require_finite_weights()
        statistics, of_ranks = self.local.collect()
        if self.ranks.num > 1:
            # They are everybody's now, and rank 0 alone has them from here on, as after a resume.
            self.losses[: self.num_losses] = losses.to(self.device) if self.ranks.is_first else 0
        self.ranks.lead(lambda: self._write(log, accuracy, losses, statistics, of_ranks))
        self.saved_step = self.step

    def _write(
        self,
        log: MetricsLog | None,
        accuracy: float | None,
        losses: Tensor,
        statistics: dict[str, Tensor],
        of_ranks: dict[str, Tensor],
    ) -> None:
        # Rows first: a checkpoint must never be ahead of the rows that it says were written.
        assert log is not None
        log.sync()
        tensors, rest = optimizer_state(self.optimizer)
        tensors |= {"losses": losses, "rng.cpu": torch.get_rng_state(), **of_ranks}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        seconds = time.perf_counter() - self._began
        facts = {"accuracy": accuracy, "seconds": seconds, "optimizer": rest}
        model = self.model.state_dict() | statistics
        save_checkpoint(self.folder / CHECKPOINTS, Checkpoint(self.step, model, tensors, facts))
        prune(self.folder / CHECKPOINTS)

    def _scores(self, model: nn.Module, num_examples: int = 0) -> Scores:
        said = predict(model, self.feed.test(num_examples=num_examples))
        return score(said.log_probabilities, said.labels, self.ranks)

    def _with_statistics(self) -> nn.Module:
        return with_population_statistics(
            self.model,
            self.feed.statistics,
            method=self.feed.statistics_method,
            group=self.ranks.group,
        )

    def _finite_losses(self) -> Tensor:
        losses = self.ranks.sum(self.losses[: self.num_losses].cpu())
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            step = self.step - len(losses) + int(bad[0]) + 1
            self._fail(f"The loss became {losses[bad[0]].item()} at step {step}")
        return losses

    def _require_finite_weights(self) -> None:
        for name, tensor in self.model.state_dict().items():
            if not tensor.isfinite().all():
                self._fail(f"{name} is no longer finite at step {self.step}")

    def _fail(self, what: str) -> None:
        kept = (
            f"{self.folder} keeps the run up to step {self.saved_step}"
            if self.saved_step >= 0
            else "Nothing was saved yet"
        )
        error = FloatingPointError(
            f"{what}: training diverged. {kept}. The same recipe would fail again: "
            f"use a learning_rate below {self.recipe.learning_rate:g} and another folder."
        )
        raise self.ranks.once(error)
