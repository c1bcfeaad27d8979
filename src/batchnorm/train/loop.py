"""The training loop: one for CPU and GPU, and one that a killed process takes up where it was."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

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
    to_safetensors,
)
from batchnorm.train.evaluate import Scores, score
from batchnorm.train.feed import Data, Feed, feed_of
from batchnorm.train.metrics import MetricsLog, ProgressReport, cut_metrics
from batchnorm.train.predictions import predict
from batchnorm.train.recipe import InceptionRecipe, Recipe
from batchnorm.train.run import (
    CHECKPOINTS,
    METRICS_FILE,
    MODEL_FILE,
    TENSORBOARD,
    image_shape,
    load_model,
    open_run,
)
from batchnorm.train.statistics import with_population_statistics


class TrainingStopped(KeyboardInterrupt):
    """A signal ended the training after a checkpoint was written; the same call goes on from there.

    A KeyboardInterrupt, so that code which survives ordinary errors does not swallow it.
    """

    def __init__(self, signal_number: int, step: int, out: Path) -> None:
        name = signal.Signals(signal_number).name
        super().__init__(
            f"{name}: stopped after step {step}, which is saved in {out}; train there again to go on"
        )
        self.signal_number = signal_number
        self.step = step


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

    Args:
        recipe: How to train.
        data: On what.
        out: Folder of the run; docs/training.md tells what it holds.
        progress: Report on standard error.
        tensorboard: Write TensorBoard events beside metrics.jsonl.
        num_workers: Processes that decode images on disk; None is one for each core but one, and 0 decodes in
            this process. Of no account for data in memory, and never for the result.
        on_step: Called after each step with the number of steps taken so far.

    Returns:
        The model and its result.

    Raises:
        ValueError: Recipe and data do not fit, or `out` holds something else.
        BlockingIOError: Another process trains in `out`.
        FloatingPointError: The loss or a weight is no longer finite; the last checkpoint is.
        TrainingStopped: SIGTERM or Ctrl-C came; the step was finished and saved.
        OSError: The disk refused; earlier checkpoints are whole.
    """
    device = resolve_device(recipe.device)
    feed = feed_of(recipe, data, device, num_workers)
    with process_settings(recipe, device), open_run(Path(out), recipe, data, device) as folder:
        trainer = _Trainer(recipe, data, feed, folder, device)
        if not (folder / MODEL_FILE).exists():
            trainer.resume()
            trainer.run(progress=progress, tensorboard=tensorboard, on_step=on_step)
        return trainer.finished()


class _Trainer:
    """Everything that changes from step to step, and what it takes to save and restore it."""

    def __init__(self, recipe: Recipe, data: Data, feed: Feed, folder: Path, device: torch.device) -> None:
        self.recipe, self.feed, self.folder, self.device = recipe, feed, folder, device
        self.model = build_model(recipe, image_shape(recipe, data), len(data.classes)).to(device)
        self.optimizer = build_optimizer(recipe, self.model)
        # Losses since the last row of metrics; read together, as each reading would halt a GPU.
        self.losses = torch.zeros(recipe.log_every, device=device)
        self.num_losses = 0
        self.step = 0
        self.saved_step = -1
        self.seconds = 0.0

    def resume(self) -> None:
        """Take over the newest whole checkpoint, if any, and forget what was reported after it."""
        checkpoint = newest_checkpoint(self.folder / CHECKPOINTS)
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint.model)
            tensors, facts = checkpoint.training, checkpoint.facts
            restore_optimizer(self.optimizer, tensors, facts["optimizer"])
            torch.set_rng_state(tensors["rng.cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
            self.num_losses = len(tensors["losses"])
            self.losses[: self.num_losses] = tensors["losses"].to(self.device)
            self.step = self.saved_step = checkpoint.step
            self.seconds = facts["seconds"]
        cut_metrics(self.folder / METRICS_FILE, self.step)

    def run(self, *, progress: bool, tensorboard: bool, on_step: Callable[[int], None] | None = None) -> None:
        """Take the remaining steps, with evaluations and checkpoints where they are due."""
        recipe = self.recipe
        self._began = time.perf_counter() - self.seconds
        events = self.folder / TENSORBOARD if tensorboard else None
        log = MetricsLog(self.folder / METRICS_FILE, events, self.step)
        report = ProgressReport(recipe.steps, self.step, shown=progress)
        with closing(log), report, _stop_requests() as requests:
            batches = self.feed.training(self.step)
            while self.step < recipe.steps:
                try:
                    self._batch = next(batches)
                except RuntimeError as error:
                    # A signal to the whole process group, as clusters send it, ends the decoders, too.
                    if not requests:
                        raise
                    if self.step != self.saved_step:
                        self._save(log, None)
                    raise TrainingStopped(requests[0], self.step, self.folder) from error
                self._take_step()
                self.step += 1
                report.step(self.step)
                if on_step is not None:
                    on_step(self.step)
                is_last = self.step == recipe.steps
                saves = is_last or self.step % recipe.checkpoint_every == 0
                evaluates = saves or self.step % recipe.eval_every == 0
                row: dict[str, float] = {}
                if evaluates or self.step % recipe.log_every == 0:
                    row = self._report(log, report, evaluate=evaluates)
                if saves or requests:
                    self._save(log, row.get("accuracy"))
                if requests and not is_last:
                    raise TrainingStopped(requests[0], self.step, self.folder)

    def finished(self) -> TrainingResult:
        """Write the model with population statistics, or read it if it is there, and evaluate it."""
        path = self.folder / MODEL_FILE
        if path.exists():
            load_model(self.folder, self.model)
            model = self.model.eval()
        else:
            model = self._with_statistics()
            # One entry only: safetensors writes several in random order, and equal runs shall be equal files.
            files.write_bytes(path, to_safetensors(model.state_dict(), {"step": str(self.step)}))
        return TrainingResult(self.folder, model, self._scores(model), tuple(self.feed.bad_images))

    def _take_step(self) -> None:
        x, labels = self._batch
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = self.model(x)
        loss = self._loss(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses[self.num_losses] = loss.detach()
        self.num_losses += 1

    def _loss(self, logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        if isinstance(logits, Tensor):
            return nn.functional.cross_entropy(logits.float(), labels)
        assert isinstance(self.recipe, InceptionRecipe)
        main, *heads = (nn.functional.cross_entropy(each.float(), labels) for each in logits)
        return main + self.recipe.head_weight * torch.stack(heads).sum()

    def _report(self, log: MetricsLog, report: ProgressReport, *, evaluate: bool) -> dict[str, float]:
        losses = self._finite_losses()
        self.num_losses = 0
        row: dict[str, float] = {"step": self.step, "loss": losses.double().mean().item()}
        if evaluate:
            self._require_finite_weights()
            scores = self._scores(self._with_statistics(), self.recipe.eval_examples)
            row |= {"accuracy": scores.top1, "test_loss": scores.loss}
        row["seconds"] = round(time.perf_counter() - self._began, 3)
        log.write(row)
        report.row(row)
        return row

    def _save(self, log: MetricsLog, accuracy: float | None) -> None:
        losses = self._finite_losses()
        self._require_finite_weights()
        # Rows first: a checkpoint must never be ahead of the rows that it says were written.
        log.sync()
        tensors, rest = optimizer_state(self.optimizer)
        tensors |= {"losses": losses, "rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        seconds = time.perf_counter() - self._began
        facts = {"accuracy": accuracy, "seconds": seconds, "optimizer": rest}
        save_checkpoint(
            self.folder / CHECKPOINTS, Checkpoint(self.step, self.model.state_dict(), tensors, facts)
        )
        prune(self.folder / CHECKPOINTS)
        self.saved_step = self.step

    def _scores(self, model: nn.Module, num_examples: int = 0) -> Scores:
        said = predict(model, self.feed.test(num_examples=num_examples))
        return score(said.log_probabilities, said.labels)

    def _with_statistics(self) -> nn.Module:
        return with_population_statistics(
            self.model, self.feed.statistics, method=self.feed.statistics_method
        )

    def _finite_losses(self) -> Tensor:
        losses = self.losses[: self.num_losses].cpu()
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
        raise FloatingPointError(
            f"{what}: training diverged. {kept}. The same recipe would fail again: "
            f"use a learning_rate below {self.recipe.learning_rate:g} and another folder."
        )


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT append to. The second one acts as if there were no training."""
    requests: list[int] = []
    # Only the main thread may set handlers; elsewhere signals are the business of whoever owns it.
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return
    earlier = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        requests.append(number)
        restore()

    for number in earlier:
        signal.signal(number, request)
    try:
        yield requests
    finally:
        restore()
