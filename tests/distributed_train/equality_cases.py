"""Trainings on one process and on several, side by side; a program, run by test_equality.py."""

import importlib.util
import os
import signal
import warnings
from dataclasses import replace

import forked_ranks
import torch
import torch.utils.tensorboard
from forked_ranks import on_ranks
from safetensors.torch import load_file
from torch import nn

from batchnorm.data import load
from batchnorm.train import bn_mlp, loop, train
from batchnorm.train.build import build_model
from batchnorm.train.checkpoint import load_checkpoint
from batchnorm.train.loop import _Trainer
from batchnorm.train.metrics import read_metrics

DATA = load("digits", size=8)
NORMALIZED = replace(
    bn_mlp(), hidden=(12, 12), steps=24, batch_size=31, learning_rate=0.3, momentum=0.9,
    log_every=5, eval_every=12, checkpoint_every=8, recalibrate_examples=101,
)  # fmt: skip
PLAIN = replace(NORMALIZED, normalize=False)


def run(recipe, out, **options):
    return train(recipe, DATA, out, progress=False, **{"tensorboard": False, **options})


def ranks(num, recipe, out, **options):
    """Train on so many ranks; what each says of its end."""

    def action(rank):
        # Another number of ranks may round otherwise, which is told.
        warnings.filterwarnings("ignore", message=r".*\(ranks . → .\)")
        result = run(recipe, out, **options)
        digest = [tensor.double().sum().item() for tensor in result.model.state_dict().values()]
        return [result.scores.top1, result.scores.loss, result.scores.num_examples, *digest]

    return on_ranks(num, action)


def at_step(step, of_rank, action):
    """Do something on one rank when it has taken so many steps."""

    def on_step(taken):
        if taken == step and torch.distributed.get_rank() == of_rank:
            action()

    return on_step


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def weights(out):
    return load_file(out / "model.safetensors")


def apart(one, other):
    """The largest difference of two runs' weights, and of their rows."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    rows = [read_metrics(out / "metrics.jsonl") for out in (one, other)]
    assert [sorted(row) for row in rows[0]] == [sorted(row) for row in rows[1]]
    return {
        # In how many batches the data of population statistics came is no weight.
        "weights": max((first[n] - second[n]).abs().max().item() for n in first if "tracked" not in n),
        "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(*rows, strict=True)),
        "accuracy": max(abs(a.get("accuracy", 0) - b.get("accuracy", 0)) for a, b in zip(*rows, strict=True)),
        "steps": [row["step"] for row in rows[1]],
    }


def same_bits(one, other):
    """Whether two runs left the same files and rows, but for the clock."""
    same = (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    ends = [load_checkpoint(out / "checkpoints" / "step-24") for out in (one, other)]
    for part in ("model", "training"):
        first, second = (getattr(end, part) for end in ends)
        same &= first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)
    rows = [read_metrics(out / "metrics.jsonl") for out in (one, other)]
    for row in [*rows[0], *rows[1]]:
        del row["seconds"]
    return same and rows[0] == rows[1]


def without_normalization(place):
    """Two and three ranks, a batch that neither divides, micro-batches: what one process computes."""
    run(PLAIN, place / "one")
    found = {}
    for num, accumulate in ((2, 1), (3, 1), (2, 4), (1, 4)):
        out = place / f"{num}-{accumulate}"
        answers = ranks(num, replace(PLAIN, accumulate=accumulate), out)
        found[f"{num} ranks, {accumulate} micro-batches"] = apart(place / "one", out)
        found.setdefault("answers", []).append(answers)
    return found


def synchronized(place):
    """Layers that normalize by the moments of all ranks: one process again, with micro-batches, too."""
    if importlib.util.find_spec("batchnorm.distributed") is None:
        return {"skipped": "there are no synchronized layers"}
    found = {}
    for num, accumulate in ((2, 1), (3, 1), (2, 3)):
        recipe = replace(NORMALIZED, accumulate=accumulate)
        one, out = place / f"one-{num}-{accumulate}", place / f"{num}-{accumulate}"
        run(recipe, one)
        answers = ranks(num, replace(recipe, sync_bn=True), out)
        ends = [load_checkpoint(run / "checkpoints" / "step-24").model for run in (one, out)]
        running = max((ends[0][n] - ends[1][n]).abs().max().item() for n in ends[0] if "running" in n)
        found[f"{num} ranks, {accumulate} micro-batches"] = apart(one, out) | {"running": running}
        found.setdefault("answers", []).append(answers)
    return found


def number_of_ranks_changes(place):
    run(PLAIN, place / "one")
    stopped = []
    for num, step in ((2, 6), (3, 14), (1, 19)):
        stopped.append(ranks(num, PLAIN, place / "other", on_step=at_step(step, num - 1, terminate)))
    end = ranks(2, PLAIN, place / "other")
    return {"stopped": stopped, "end": end, **apart(place / "one", place / "other")}


def resumed(place):
    """Three ranks, local statistics and dropout, stopped twice: the same bits as without a stop."""
    plain = build_model

    def with_dropout(recipe, *sizes):
        model = plain(recipe, *sizes)
        return nn.Sequential(model.flatten, nn.Dropout(0.3), *list(model.children())[1:])

    loop.build_model = with_dropout
    try:
        found = {}
        for name, recipe in {"": NORMALIZED, "micro-batches": replace(NORMALIZED, accumulate=2)}.items():
            whole, cut = place / f"whole {name}", place / f"cut {name}"
            ranks(3, recipe, whole)
            stops = [ranks(3, recipe, cut, on_step=at_step(at, at % 3, terminate)) for at in (5, 16)]
            ranks(3, recipe, cut)
            found[name or "one batch"] = {"stops": stops, "same": same_bits(whole, cut)}
        return found
    finally:
        loop.build_model = plain


def statistics_are_of_all_ranks(place):
    """Local while training; pooled in a checkpoint; of the whole for an evaluation."""
    own = {}
    take_step = _Trainer._take_step

    def action(rank):
        def noted(trainer):
            take_step(trainer)
            own["state"] = {n: b.tolist() for n, b in trainer.model.named_buffers() if "running" in n}

        _Trainer._take_step = noted
        run(NORMALIZED, place / "two")
        return own["state"]

    answers = on_ranks(2, action)
    end = load_checkpoint(place / "two" / "checkpoints" / "step-24")
    pooled = {n: t.tolist() for n, t in end.model.items() if "running" in n}
    # One process that takes up that checkpoint computes statistics of the whole by itself.
    (place / "one").mkdir()
    for name in ("recipe.json", "checkpoints"):
        (place / "one" / name).symlink_to(place / "two" / name)
    run(NORMALIZED, place / "one")
    both = [{n: t.tolist() for n, t in weights(place / out).items()} for out in ("one", "two")]
    return {"own": [a["value"] for a in answers], "pooled": pooled, "one": both[0], "two": both[1]}


def batch_of_each_rank(place):
    recipe = replace(PLAIN, batch_size=10, recalibrate_examples=0)
    run(replace(recipe, batch_size=30), place / "one")
    ranks(3, replace(recipe, batch_per_rank=True), place / "three")
    return apart(place / "one", place / "three")


if __name__ == "__main__":
    each = (
        without_normalization,
        synchronized,
        number_of_ranks_changes,
        resumed,
        statistics_are_of_all_ranks,
        batch_of_each_rank,
    )
    forked_ranks.main({case.__name__: case for case in each})
