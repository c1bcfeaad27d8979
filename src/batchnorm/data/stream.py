"""Batches of decoded images from worker processes: a function of seed and step, whoever computes it.

What a step shows depends on nothing that came before, so there is no state to save: a stream that is
started at step 1000 goes on where one that was killed after 999 would have.
"""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Literal

import torch
from torch.utils.data import DataLoader

from batchnorm.data.batches import Shuffle
from batchnorm.data.crops import evaluation_crops
from batchnorm.data.folders import ImageSet
from batchnorm.data.steps import BadImages, Batch, Batches, EvaluationBatches, Made, TrainingBatches

MAX_BAD = 0.01
"""Share of bad images that is put up with."""
MIN_SEEN, MIN_BAD = 100, 10
"""Images seen, and bad ones among them, before their share tells something about the whole set."""


class Stream(Iterator[Batch]):
    """Iterates over batches, and counts what was left out. Made by the two functions below.

    Attributes:
        bad: Every bad image met so far by this rank, once: its name and what is wrong with it.
        num_seen: Images met so far by this rank, bad ones included, repeatedly if met so.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        num_workers: int,
        prefetch: int,
        pin_memory: bool,
        max_bad: float,
    ) -> None:
        self.bad: list[str] = []
        self.num_seen = 0
        self._known: set[str] = set()
        self._num_images, self._max_bad = len(batches.images), max_bad
        loader = DataLoader(
            batches,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            multiprocessing_context=_context() if num_workers else None,
            worker_init_fn=_begin_worker,
            pin_memory=pin_memory,
            # Its own, so that starting a stream draws nothing from the generator that training depends on.
            generator=torch.Generator(),
        )
        self._made: Iterator[Made] | None = iter(loader)

    def __next__(self) -> Batch:
        while True:
            made = self._next_made()
            self.num_seen += made.num_seen
            new = [name for name in made.bad if name not in self._known]
            self._known.update(new)
            self.bad += new
            if made.error is not None:
                self.close()
                raise made.error
            if new:
                self._check_share()
            if made.batch is not None:
                return made.batch

    def close(self) -> None:
        """Stop the workers; the stream is at its end."""
        self._made = None

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_made(self) -> Made:
        if self._made is None:
            raise StopIteration
        try:
            return next(self._made)
        except StopIteration:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:
            self.close()
            # A batch is fetched from the memory of its worker, which may die before, between or after.
            if isinstance(error, RuntimeError) and not re.search("exited unexpectedly|killed by", str(error)):
                raise
            raise RuntimeError(
                "A process that decodes images was killed, perhaps for want of memory, or of shared memory "
                "(/dev/shm). Nothing that was saved is lost: go on with fewer workers, or free some memory."
            ) from error

    def _check_share(self) -> None:
        num_bad = len(self.bad)
        enough = self.num_seen >= MIN_SEEN and num_bad >= MIN_BAD
        if num_bad > self._max_bad * self._num_images or (enough and num_bad > self._max_bad * self.num_seen):
            self.close()
            raise BadImages(
                f"{num_bad} bad images among {min(self.num_seen, self._num_images)} of {self._num_images}, "
                f"more than {self._max_bad:.1%}:\n" + "\n".join(f"  {name}" for name in self.bad) + "\n"
                "Replace or remove them, then go on."
            )


def training_stream(
    images: ImageSet,
    *,
    start_step: int,
    num_steps: int,
    batch_size: int,
    size: int,
    seed: int,
    shuffle: Shuffle = "all",
    mirror: bool = True,
    rank: int = 0,
    world_size: int = 1,
    num_parts: int = 1,
    stride: int = 1,
    num_workers: int = 0,
    prefetch: int = 4,
    pin_memory: bool = False,
    max_bad: float = MAX_BAD,
) -> Stream:
    """Randomly cropped and mirrored batches of the steps from ``start_step`` on.

    The images of a step are those of `step_indices`; each rank gets its `Share` of them. Box and
    mirroring of an image depend on seed, epoch and the image's number alone. So the pixels of a step are
    the same for any number of workers and ranks, before and after a resume.

    A bad image's place is taken by the image of the next number that is good (after the last comes the
    first), with its label; the batch stays full, and that image may come twice in the epoch.

    Args:
        images: Folder or shards.
        start_step: First step, counted from 0 over the whole training.
        num_steps: How many; then the stream ends.
        batch_size: Images of a step over all ranks.
        size: Side of the crops, pixels.
        seed: Of order, boxes and mirroring.
        shuffle: See `shuffled_order`.
        mirror: Whether half of the crops are mirrored, left to right; the boxes are the same either way.
        rank: This process among those that train together.
        world_size: Their number.
        num_parts: Micro-batches of a step, of each of which a rank gets a part.
        stride: From one batch of the stream to the next: 2 makes those of every other step.
        num_workers: Processes that decode; 0 decodes in this one.
        prefetch: Batches that each worker keeps ready.
        pin_memory: Put batches where a GPU can fetch them without waiting.
        max_bad: Share of bad images that is put up with; of the whole set, or of those seen once they
            are 100 and 10 of them bad.

    Returns:
        An iterator of `Batch`, ``num_steps`` long; a context manager that stops the workers.

    Raises:
        ValueError: Sizes that do not fit each other.
        BadImages: While iterating: too many images are bad; the message lists them.
    """
    _check_world(rank, world_size, size, num_workers)
    if num_steps < 0:
        raise ValueError(f"num_steps must not be negative, got {num_steps}.")
    if num_parts < 1 or stride < 1:
        raise ValueError(f"num_parts and stride must be at least 1, got {num_parts} and {stride}.")
    batches = TrainingBatches(
        images=images,
        start_step=start_step,
        num_steps=num_steps,
        batch_size=batch_size,
        size=size,
        seed=seed,
        shuffle=shuffle,
        mirror=mirror,
        rank=rank,
        world_size=world_size,
        num_parts=num_parts,
        stride=stride,
    )
    batches.numbers(0)  # What does not fit is told now, by this process.
    return Stream(
        batches,
        num_workers=num_workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        max_bad=max_bad,
    )


def evaluation_stream(
    images: ImageSet,
    *,
    size: int,
    crops: Literal[1, 10, 144] = 1,
    batch_size: int = 32,
    num_images: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
    max_bad: float = MAX_BAD,
) -> Stream:
    """The crops of `evaluation_crops` of every image, each image once over all ranks.

    A rank gets a contiguous part of the numbers, as equal as can be; its last batch may be smaller, and
    bad images are left out of theirs.

    Args:
        images: Folder or shards.
        size: Side of the crops, pixels.
        crops: Of each image.
        batch_size: Images (not crops) of a batch of this rank.
        num_images: Only the first so many of the set; 0 for all.
        rank: This process among those that evaluate together.
        world_size: Their number.
        num_workers: Processes that decode; 0 decodes in this one.
        prefetch: Batches that each worker keeps ready.
        pin_memory: Put batches where a GPU can fetch them without waiting.
        max_bad: As for `training_stream`.

    Returns:
        An iterator of `Batch`; a context manager that stops the workers.

    Raises:
        ValueError: Sizes that do not fit each other.
        BadImages: While iterating: too many images are bad; the message lists them.
    """
    _check_world(rank, world_size, size, num_workers)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 image, got {batch_size}.")
    evaluation_crops(size, size, crops, size)
    if num_images < 0:
        raise ValueError(f"num_images must not be negative, got {num_images}.")
    total = min(num_images or len(images), len(images))
    first, end = (total * part // world_size for part in (rank, rank + 1))
    return Stream(
        EvaluationBatches(images=images, crops=crops, size=size, batch_size=batch_size, first=first, end=end),
        num_workers=num_workers,
        prefetch=prefetch,
        pin_memory=pin_memory,
        max_bad=max_bad,
    )


def _check_world(rank: int, world_size: int, size: int, num_workers: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}.")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}.")
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}.")


def _context() -> BaseContext:
    # A fork of a process in which OpenMP or CUDA has begun may hang; forks of a server that only imports
    # do not, and start at once where a fresh process would import PyTorch for seconds.
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "batchnorm.data.stream"])
    return context


def _begin_worker(_: int) -> None:
    # Ctrl-C reaches the whole group; the training finishes its step and saves, and needs batches for that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # DataLoader's own watch asks for the process that forked this one. Here that is the fork server,
    # which lives as long as its children do: both would outlive a training that was killed.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
