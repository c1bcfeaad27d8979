"""Faults of single ranks; a program, run by test_faults.py."""

import errno
import os
import signal
import time
from dataclasses import replace
from unittest import mock

import equality_cases
import forked_ranks
import torch
import torch.distributed as dist
from equality_cases import DATA, NORMALIZED, PLAIN, at_step, ranks, run, same_bits
from forked_ranks import on_ranks

from batchnorm import files
from batchnorm.train import loop
from batchnorm.train.checkpoint import load_checkpoint
from batchnorm.train.feed import MemoryFeed
from batchnorm.train.metrics import read_metrics
from batchnorm.train.run import open_run

SHORT_S = 4.0
"""That a rank waits for one which hangs."""


def on_one(rank, what):
    """Train with ``what(step, x, labels)`` between the batches of one rank and its training."""
    training = MemoryFeed.training

    def changed(feed, start_step):
        for step, batch in enumerate(training(feed, start_step), start=start_step):
            if dist.get_rank() == rank:
                batch = what(step, *batch)
                if batch is None:
                    return
            yield batch

    return mock.patch.object(MemoryFeed, "training", changed)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def lost(place):
    """Rank 1 is killed in the middle, then rank 0; each time the other ends soon, and the run goes on."""
    ranks(2, NORMALIZED, place / "whole")
    found = []
    for rank, step in ((1, 11), (0, 18)):
        answers = ranks(2, NORMALIZED, place / "cut", on_step=at_step(step, rank, kill))
        found.append({"answers": answers, "checkpoints": checkpoints(place / "cut")})
    end = ranks(2, NORMALIZED, place / "cut")
    return {"lost": found, "end": end, "same": same_bits(place / "whole", place / "cut")}


def lost_while_writing(place):
    """Rank 0 is killed with half a checkpoint written."""
    ranks(2, NORMALIZED, place / "whole")
    write = files._write_synced

    def dies(path, data):
        if ".step-16" in str(path) and path.name.startswith("training"):
            path.write_bytes(data[: len(data) // 2])
            kill()
        write(path, data)

    with mock.patch.object(files, "_write_synced", dies):
        answers = ranks(2, NORMALIZED, place / "cut")
    left = checkpoints(place / "cut")
    end = ranks(2, NORMALIZED, place / "cut")
    return {"answers": answers, "left": left, "end": end, "same": same_bits(place / "whole", place / "cut")}


def hangs(place):
    """Rank 1 sleeps: the others wait as long as they were told, and no longer."""

    def action(rank):
        began = time.perf_counter()
        try:
            run(PLAIN, place / "run", on_step=at_step(5, 1, lambda: time.sleep(4 * SHORT_S)))
        finally:
            if rank == 0:
                took.append(time.perf_counter() - began)

    took: list[float] = []
    return {"answers": on_ranks(2, action, timeout_s=SHORT_S, limit_s=60)}


def loader_ends(place):
    """The batches of one rank end early: all stop, what was learned is kept, and the run goes on."""
    ranks(2, NORMALIZED, place / "whole")
    with on_one(1, lambda step, x, labels: (x, labels) if step < 11 else None):
        answers = ranks(2, NORMALIZED, place / "cut")
    left = checkpoints(place / "cut")
    end = ranks(2, NORMALIZED, place / "cut")
    return {"answers": answers, "left": left, "end": end, "same": same_bits(place / "whole", place / "cut")}


def loader_fails(place):
    def fail(step, x, labels):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "photos/17.jpg")

    with on_one(1, fail):
        return {"answers": ranks(2, PLAIN, place / "run")}


def nan(place):
    """One rank sees NaN: all stop, naming the step, and no such weights are saved."""

    def poison(step, x, labels):
        return (x * float("nan") if step == 10 else x), labels

    with on_one(1, poison):
        answers = ranks(2, PLAIN, place / "run")
    finite = [
        bool(torch.cat([t.flatten() for t in load_checkpoint(path).model.values()]).isfinite().all())
        for path in (place / "run" / "checkpoints").iterdir()
    ]
    return {"answers": answers, "left": checkpoints(place / "run"), "finite": finite}


def uneven(place):
    """Ranks with other numbers of examples than they should have, down to none, in some steps."""
    kept = {3: 5, 4: 2, 5: 0, 6: 0, 7: 9, 23: 0}
    found = {}
    for name, recipe in {
        "plain": PLAIN,
        "normalized": NORMALIZED,
        "micro-batches": replace(PLAIN, accumulate=3),
    }.items():
        with on_one(1, lambda step, x, labels: (x[: kept.get(step)], labels[: kept.get(step)])):
            found[name] = ranks(2, recipe, place / name)

    # One process with the same examples: rank 0's first part of each batch, and those kept of rank 1's.
    training = MemoryFeed.training

    def fewer(feed, start_step):
        for step, (x, labels) in enumerate(training(feed, start_step), start=start_step):
            end = 15 + kept.get(step, 16)
            yield x[:end], labels[:end]

    with mock.patch.object(MemoryFeed, "training", fewer):
        run(PLAIN, place / "one")
    return {"answers": found, **equality_cases.apart(place / "one", place / "plain")}


def folder_vanishes(place):
    """The newest checkpoint goes, then all of them: the run begins where there is one, or anew."""
    ranks(2, NORMALIZED, place / "whole")
    found = []
    for newest in (True, False):
        cut = place / f"cut {newest}"
        ranks(2, NORMALIZED, cut, on_step=at_step(18, 1, kill))
        folder = cut / "checkpoints"
        if newest:
            (folder / "step-16").rename(place / "gone")
        else:
            folder.rename(place / "all gone")
        end = ranks(2, NORMALIZED, cut)
        found.append({"end": end, "same": same_bits(place / "whole", cut)})
    return {"found": found}


def two_launches(place):
    recipe, out = NORMALIZED, place / "run"
    with open_run(out, recipe, DATA, torch.device("cpu"), num_ranks=2):
        second = ranks(2, recipe, out)
    other = ranks(2, replace(recipe, seed=3), out)
    return {"second": second, "other": other, "rows": len(read_metrics(out / "metrics.jsonl"))}


def full_disk(place):
    write = files._write_synced

    def fails(path, data):
        if ".step-16" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    with mock.patch.object(files, "_write_synced", fails):
        answers = ranks(2, PLAIN, place / "run")
    return {"answers": answers, "left": checkpoints(place / "run")}


def ranks_told_otherwise(place):
    def action(rank):
        run(replace(PLAIN, learning_rate=0.1 + rank), place / "run")

    return {"answers": on_ranks(2, action)}


def fails_in_the_step(place):
    """An error that one rank alone meets, outside all exchanges."""

    def action(rank):
        take = loop.BatchGradient.compute

        def fail(*arguments, step, **options):
            if rank == 1 and step == 4:
                raise ValueError("rank 1 only")
            return take(*arguments, step=step, **options)

        with mock.patch.object(loop.BatchGradient, "compute", fail):
            run(PLAIN, place / "run")

    return {"answers": on_ranks(2, action)}


if __name__ == "__main__":
    each = (
        lost,
        lost_while_writing,
        hangs,
        loader_ends,
        loader_fails,
        nan,
        uneven,
        folder_vanishes,
        two_launches,
        full_disk,
        ranks_told_otherwise,
        fails_in_the_step,
    )
    forked_ranks.main({case.__name__: case for case in each})
