"""The parts that ranks have of a batch: together they are the batch, changed at random as a whole."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_sets import write_folder
from torch import nn

from batchnorm.data import ImageData, Share, open_images
from batchnorm.train import bn_mlp, get_recipe, mlp, train
from batchnorm.train.feed import FilesFeed, MemoryFeed, share_of
from batchnorm.train.gradient import BatchGradient
from batchnorm.train.inputs import training_input
from batchnorm.train.ranks import ALONE, Ranks
from batchnorm.train.recipe import Recipe

CPU = torch.device("cpu")
INCEPTION = replace(
    get_recipe("bn-x5", "cifar10"), width=0.05, steps=4, batch_size=11, recalibrate_examples=24, shard_size=5
)


@pytest.fixture(scope="module")
def colours():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    labels = random.integers(0, 3, 60)
    return ImageData("noise", images[:40], labels[:40], images[40:], labels[40:], ("r", "g", "b"))


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("total", [1, 7, 12, 60])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_place_belongs_to_one_rank(total, world_size, num_parts):
    shares = [Share.of(total, rank, world_size, num_parts) for rank in range(world_size)]
    places = torch.cat([share.places for share in shares])
    assert sorted(places.tolist()) == list(range(total))
    assert all(sum(share.sizes) == len(share.places) for share in shares)
    sizes = [sum(share.sizes) for share in shares]
    assert max(sizes) - min(sizes) <= num_parts
    # Micro-batches are the same examples whatever the number of ranks.
    for part in range(num_parts):
        mine = torch.cat([share.places.split(share.sizes)[part] for share in shares])
        assert mine.tolist() == list(range(total * part // num_parts, total * (part + 1) // num_parts))


@pytest.mark.parametrize("crops", ["shift", "area", "none"])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_ranks_see_the_batch_of_one_process_with_its_distortions(colours, crops, num_parts):
    recipe = replace(INCEPTION, crops=crops, normalize=False, accumulate=num_parts)
    whole = list(MemoryFeed(recipe, colours, CPU).training(1))
    feeds = [MemoryFeed(recipe, colours, CPU, Ranks(rank, 3)) for rank in range(3)]
    for step, parts in enumerate(zip(*(feed.training(1) for feed in feeds), strict=True)):
        x, labels = (torch.empty_like(each) for each in whole[step])
        for feed, (mine, its) in zip(feeds, parts, strict=True):
            x[feed.share.places], labels[feed.share.places] = mine, its
        assert x.equal(whole[step][0])
        assert labels.equal(whole[step][1])


def test_a_rank_may_have_nothing(colours):
    images = torch.from_numpy(colours.train_images[:0])
    for crops in ("shift", "area"):
        share = Share.of(2, 0, 3)
        assert training_input(replace(INCEPTION, crops=crops), images, 0, share=share).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_images_on_disk_are_shared_without_repeats(tmp_path, num_parts):
    data = open_images(
        write_folder(tmp_path / "images", {"cat": 9, "dog": 10, "owl": 8}, {"cat": 4, "dog": 3, "owl": 3})
    )
    recipe = replace(INCEPTION, crops="area", shard_size=1000, accumulate=num_parts)
    whole = list(FilesFeed(recipe, data, CPU, 0).training(0))
    feeds = [FilesFeed(recipe, data, CPU, 0, Ranks(rank, 2)) for rank in range(2)]
    for step, parts in enumerate(zip(*(feed.training(0) for feed in feeds), strict=True)):
        x = torch.empty_like(whole[step][0])
        for feed, (mine, _) in zip(feeds, parts, strict=True):
            x[feed.share.places] = mine
        assert x.equal(whole[step][0])
    # Whole batches in turn: each is normalized by itself.
    batches = list(FilesFeed(recipe, data, CPU, 0).statistics())
    for rank, feed in enumerate(feeds):
        mine = list(feed.statistics())
        assert all(a.equal(b) for a, b in zip(mine, batches[rank::2], strict=True))
    labels = [np.concatenate([p.labels for p in feed.test(num_examples=7)]) for feed in feeds]
    assert np.concatenate(labels).tolist() == data.val.labels[:7].tolist()


@pytest.mark.parametrize("num", [1, 2, 3])
def test_data_in_memory_are_shared_for_statistics_and_tests(colours, num):
    for recipe in (INCEPTION, replace(INCEPTION, recalibrate_examples=0)):
        feeds = [MemoryFeed(recipe, colours, CPU, Ranks(rank, num)) for rank in range(num)]
        whole = torch.cat(list(MemoryFeed(recipe, colours, CPU).statistics()))
        parts = [batch for feed in feeds for batch in feed.statistics()]
        assert torch.cat(parts).equal(whole)
        labels = [part.labels for feed in feeds for part in feed.test(num_examples=13)]
        assert np.concatenate(labels).tolist() == colours.test_labels[:13].tolist()


def test_one_example_to_normalize_is_refused_on_every_rank():
    recipe = replace(bn_mlp(), batch_size=7, accumulate=2)
    for rank in range(2):
        with pytest.raises(ValueError, match=r"7 examples a step on 2 ranks with accumulate 2.*1 at a time"):
            share_of(recipe, Ranks(rank, 2))
    assert share_of(replace(recipe, sync_bn=True), Ranks(1, 2)).sizes == (2, 2)
    assert share_of(replace(recipe, normalize=False), Ranks(0, 9)).total == 7
    assert share_of(replace(recipe, batch_per_rank=True), Ranks(0, 9)).total == 63


def test_micro_batches_give_the_gradient_of_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, labels = torch.randn(11, 5).double(), torch.randint(0, 3, (11,))
    loss = nn.functional.cross_entropy(model(x).float(), labels)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for num_parts in (1, 3, 11):
        recipe = replace(mlp(), accumulate=num_parts)
        optimizer.zero_grad()
        sizes = Share.of(11, num_parts=num_parts).sizes
        total = BatchGradient(model, optimizer, recipe, ALONE).compute(
            x, labels, step=0, sizes=sizes, total=11
        )
        torch.testing.assert_close(total, loss.detach())
        for got, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(got.grad, wanted, rtol=1e-5, atol=1e-7)


def test_running_statistics_move_once_a_step(colours, tmp_path):
    """By the pooled moments of the step's micro-batches, and the layers stay those of the recipe."""
    recipe = replace(INCEPTION, batch_size=12, accumulate=3, steps=1, checkpoint_every=1)
    moved = []

    def note(number):
        norms = [m for m in seen[0].modules() if isinstance(m, nn.BatchNorm2d)]
        moved.extend(int(norm.num_batches_tracked) for norm in norms)

    seen = []
    build = BatchGradient.__init__

    def kept(self, model, *arguments):
        seen.append(model)
        build(self, model, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchGradient, "__init__", kept)
        train(recipe, colours, tmp_path / "run", progress=False, tensorboard=False, on_step=note)
    assert moved
    assert set(moved) == {1}


def test_recipes_of_older_runs_are_read():
    values = bn_mlp().to_json()
    for name in ("accumulate", "batch_per_rank", "sync_bn"):
        del values[name]
    assert Recipe.from_json(json.loads(json.dumps(values))) == bn_mlp()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param({"accumulate": 0}, "accumulate must be at least 1", id="no micro-batch"),
        pytest.param({"accumulate": 31}, "two examples in each micro-batch of 60", id="one in each"),
        pytest.param({"normalize": False, "sync_bn": True}, "false without normalize", id="nothing to sync"),
    ],
)
def test_fields_that_contradict_each_other(changes, says):
    with pytest.raises(ValueError, match=says):
        replace(bn_mlp(), **changes)
