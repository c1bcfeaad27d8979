"""Training and evaluating Inception, small: on images in memory and on images that are decoded on the way."""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from image_sets import write_folder

import batchnorm as bn
from batchnorm.data import ImageData, crop_batch, evaluation_crops, open_images, to_input
from batchnorm.data.augment import standardize
from batchnorm.train import TrainingStopped, evaluate_runs, get_recipe, predictions, train
from batchnorm.train.build import build_model
from batchnorm.train.feed import FilesFeed, MemoryFeed
from batchnorm.train.inputs import evaluation_input, training_input, views
from batchnorm.train.metrics import read_metrics

CPU = torch.device("cpu")
TINY = replace(
    get_recipe("bn-x5", "cifar10"), width=0.05, steps=6, batch_size=6, log_every=2, eval_every=3,
    checkpoint_every=3, recalibrate_examples=12, learning_rate=0.01, eval_examples=0,
)  # fmt: skip
AREA = replace(TINY, crops="area")
TINY = replace(TINY, shard_size=5)


@pytest.fixture(scope="module")
def colours():
    """Three classes of 32×32, told apart by which colour is strongest."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    images = random.integers(0, 120, (60, 3, 32, 32), dtype=np.uint8)
    images[np.arange(60), labels] += 100
    return ImageData("cifar10", images[:40], labels[:40], images[40:], labels[40:], ("r", "g", "b"))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", {"cat": 9, "dog": 10, "owl": 8}, {"cat": 4, "dog": 3, "owl": 3})


def same_weights(one, other):
    return all(
        a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_training_input_is_a_function_of_seed_and_step(colours):
    images = torch.from_numpy(colours.train_images[:6])
    first, again = (training_input(TINY, images, 3) for _ in range(2))
    assert first.equal(again)
    assert not first.equal(training_input(TINY, images, 4))
    assert not first.equal(training_input(replace(TINY, seed=1), images, 3))
    area = training_input(AREA, images, 3)
    assert area.equal(training_input(AREA, images, 3))
    assert not area.equal(first)


def test_without_random_changes_training_sees_what_evaluation_sees(colours):
    images = torch.from_numpy(colours.train_images[:6])
    still = replace(TINY, crops="none", mirror=False, distortion=0.0)
    assert training_input(still, images, 3).equal(evaluation_input(still, images))
    torch.testing.assert_close(evaluation_input(still, images), standardize(images / 255))


def test_feed_of_memory_has_the_images_of_each_step(colours):
    still = replace(TINY, crops="none", mirror=False, distortion=0.0, shuffle="none")
    feed = MemoryFeed(still, colours, CPU)
    steps = list(feed.training(4))
    assert len(steps) == 2
    for number, (x, labels) in enumerate(steps, start=4):
        part = slice(number * 6, number * 6 + 6)
        torch.testing.assert_close(x, evaluation_input(still, torch.from_numpy(colours.train_images[part])))
        assert labels.tolist() == colours.train_labels[part].tolist()


@pytest.mark.parametrize("crops", [1, 10, 144])
def test_views_are_the_papers_crops(colours, crops):
    images = torch.from_numpy(colours.test_images[:2])
    found = list(views(AREA, images, crops))
    assert len(found) == crops
    if crops == 1:
        assert found[0].equal(evaluation_input(AREA, images))
        return
    for view, crop in zip(found, evaluation_crops(32, 32, crops, 32), strict=True):
        torch.testing.assert_close(view, standardize(crop_batch(to_input(images), crop, 32)))
    # Crops come in pairs, the second being the first one's mirror image.
    torch.testing.assert_close(found[0].flip(-1), found[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("crops", [10, 144])
def test_a_network_trained_on_moved_images_sees_such_images(colours, crops):
    images = torch.from_numpy(colours.test_images[:2])
    found = list(views(TINY, images, crops))
    assert len(found) == crops
    grey = to_input(torch.full((2, 3, 32, 32), 128, dtype=torch.uint8))
    levels = to_input(images)
    # Moved by four pixels down and right, as the first view shows it; then mirrored.
    moved = grey.clone()
    moved[..., 4:, 4:] = levels[..., :-4, :-4]
    torch.testing.assert_close(found[0], standardize(moved))
    torch.testing.assert_close(found[1], standardize(moved.flip(-1)))
    if crops == 10:
        assert found[8].equal(evaluation_input(TINY, images))
    distinct = {view.numpy().tobytes() for view in found}
    assert len(distinct) == crops


@pytest.mark.parametrize("recipe", [TINY, AREA, replace(TINY, heads=0, shuffle="shards+within")])
def test_a_stopped_run_ends_with_the_same_bits(colours, tmp_path, recipe):
    whole = train(recipe, colours, tmp_path / "whole", progress=False, tensorboard=False)
    train(recipe, colours, tmp_path / "cut", progress=False, tensorboard=False)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-6")
    (tmp_path / "cut" / "model.safetensors").unlink()
    resumed = train(recipe, colours, tmp_path / "cut", progress=False, tensorboard=False)
    assert same_weights(whole.model, resumed.model)
    assert resumed.scores == whole.scores


def test_rate_decays_while_training(colours, tmp_path, monkeypatch):
    recipe = replace(TINY, rate_decay=0.5, decay_every=2)
    rates = []
    step = torch.optim.SGD.step

    def noted(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    train(recipe, colours, tmp_path / "run", progress=False, tensorboard=False)
    assert rates == [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]


def test_heads_weigh_in_the_loss(tmp_path):
    random = np.random.default_rng(0)
    labels = np.arange(8) % 2
    images = random.integers(0, 256, (8, 3, 224, 224), dtype=np.uint8)
    data = ImageData("large", images, labels, images[:2], labels[:2], ("a", "b"))
    recipe = replace(
        TINY, stem="imagenet", image_size=224, heads=2, steps=1, batch_size=4, log_every=1, eval_every=1,
        crops="none", mirror=False, distortion=0.0, head_weight=0.25, recalibrate_examples=4,
    )  # fmt: skip
    train(recipe, data, tmp_path / "run", progress=False, tensorboard=False)
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    net = build_model(recipe, (3, 224, 224), 2)
    x, truth = next(MemoryFeed(recipe, data, CPU).training(0))
    losses = [torch.nn.functional.cross_entropy(logits, truth) for logits in net(x)]
    assert row["loss"] == pytest.approx((losses[0] + 0.25 * (losses[1] + losses[2])).item(), rel=1e-5)


def test_folder_to_folded_model(folder, tmp_path):
    """What the docs promise: from a folder of images to a trained, evaluated, folded model."""
    data = open_images(folder)
    result = train(AREA, data, tmp_path / "run", progress=False, tensorboard=False, num_workers=0)
    assert result.scores.num_examples == 10
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4, 6]
    (one,) = evaluate_runs([tmp_path / "run"], num_workers=0)
    assert one.scores == result.scores
    (ten,) = evaluate_runs([tmp_path / "run"], crops=10, per_class=True, num_workers=0)
    assert ten.scores.loss != one.scores.loss
    right = sum(ten.per_class[name] * count for name, count in {"cat": 4, "dog": 3, "owl": 3}.items())
    assert right / 10 == pytest.approx(ten.scores.top1)
    x = torch.randn(2, 3, 32, 32)
    folded, proof = bn.fold(result.model, x)
    assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in folded.modules()), proof
    torch.testing.assert_close(folded(x), result.model(x), rtol=1e-3, atol=1e-4)


def test_workers_change_nothing(folder, tmp_path):
    data = open_images(folder)
    alone, helped = (
        train(AREA, data, tmp_path / f"{n}", progress=False, tensorboard=False, num_workers=n) for n in (0, 2)
    )
    assert same_weights(alone.model, helped.model)


def test_a_run_on_images_goes_on_where_it_was(folder, tmp_path):
    data = open_images(folder)
    whole = train(AREA, data, tmp_path / "whole", progress=False, tensorboard=False, num_workers=0)
    train(AREA, data, tmp_path / "cut", progress=False, tensorboard=False, num_workers=0)
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-6")
    (tmp_path / "cut" / "model.safetensors").unlink()
    resumed = train(AREA, data, tmp_path / "cut", progress=False, tensorboard=False, num_workers=1)
    assert same_weights(whole.model, resumed.model)


def test_bad_images_are_named_and_left_out(tmp_path):
    folder = write_folder(tmp_path / "images", {"cat": 120, "dog": 120}, {"cat": 4, "dog": 4})
    (folder / "train" / "cat" / "000.jpg").write_bytes(b"")
    recipe = replace(AREA, steps=40, batch_size=12, log_every=40, eval_every=40, checkpoint_every=40)
    result = train(
        recipe, open_images(folder), tmp_path / "run", progress=False, tensorboard=False, num_workers=0
    )
    (bad,) = result.bad_images
    assert "000.jpg" in bad


def test_other_images_are_another_run(folder, tmp_path):
    train(AREA, open_images(folder), tmp_path / "run", progress=False, tensorboard=False, num_workers=0)
    (folder / "train" / "cat" / "000.jpg").rename(folder / "train" / "dog" / "999.jpg")
    with pytest.raises(ValueError, match="data sha256"):
        train(AREA, open_images(folder), tmp_path / "run", progress=False, tensorboard=False, num_workers=0)
    with pytest.raises(ValueError, match="was trained on other data"):
        evaluate_runs([tmp_path / "run"], num_workers=0)


def test_moved_images_are_found_where_data_dir_says(folder, tmp_path):
    result = train(
        AREA, open_images(folder), tmp_path / "run", progress=False, tensorboard=False, num_workers=0
    )
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        evaluate_runs([tmp_path / "run"], num_workers=0)
    (found,) = evaluate_runs([tmp_path / "run"], data_dir=tmp_path / "elsewhere", num_workers=0)
    assert found.scores == result.scores


def test_recipes_that_cannot_see_images_on_disk(folder, tmp_path):
    for recipe in (TINY, get_recipe("bn-mlp")):
        with pytest.raises(ValueError, match="cut by area"):
            train(recipe, open_images(folder), tmp_path / "run", progress=False, num_workers=0)


def test_shards_of_images_on_disk_are_their_own(folder, tmp_path):
    recipe = replace(AREA, shard_size=7)
    with pytest.raises(ValueError, match=r"have shards already.*not 7"):
        train(recipe, open_images(folder), tmp_path / "run", progress=False, num_workers=0)


def test_whole_images_are_mirrored_unless_told_otherwise(colours):
    images = torch.from_numpy(colours.train_images[:12])
    whole = replace(TINY, crops="none", distortion=0.0)
    seen, still = training_input(whole, images, 0), evaluation_input(whole, images)
    mirrored = [a.equal(b.flip(-1)) for a, b in zip(seen, still, strict=True)]
    assert 0 < sum(mirrored) < 12
    assert all(flipped or a.equal(b) for flipped, a, b in zip(mirrored, seen, still, strict=True))


def test_statistics_of_images_are_of_the_first_steps(folder):
    feed = FilesFeed(AREA, open_images(folder), CPU, 0)
    batches = list(feed.statistics())
    assert [tuple(batch.shape) for batch in batches] == [(6, 3, 32, 32)] * 2
    assert all(a.equal(b) for a, b in zip(batches, feed.statistics(), strict=True))


def test_predictions_are_kept_and_read_again(colours, tmp_path, monkeypatch):
    train(TINY, colours, tmp_path / "run", progress=False, tensorboard=False)
    monkeypatch.setattr(predictions, "load", lambda *_, **__: colours)
    (first,) = evaluate_runs([tmp_path / "run"], crops=10)
    passes = []
    monkeypatch.setattr(predictions, "_predict", lambda *arguments: passes.append(arguments))
    (again,) = evaluate_runs([tmp_path / "run"], crops=10)
    assert again.scores == first.scores
    assert not passes
    monkeypatch.undo()
    monkeypatch.setattr(predictions, "load", lambda *_, **__: colours)
    # A damaged file is made again, and so are those of other weights.
    (kept,) = (tmp_path / "run" / "predictions").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:100])
    (mended,) = evaluate_runs([tmp_path / "run"], crops=10)
    assert mended.scores == first.scores
    assert kept.read_bytes() == whole
    train(replace(TINY, seed=1), colours, tmp_path / "other", progress=False, tensorboard=False)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "run" / "model.safetensors")
    (other,) = evaluate_runs([tmp_path / "run"], crops=10)
    assert other.scores.loss != first.scores.loss


def test_decoders_that_a_signal_ended_are_no_error(folder, tmp_path, monkeypatch):
    """A cluster's SIGTERM reaches the workers as well: the run is saved, and goes on later."""
    feed_training = FilesFeed.training

    def ended(self, start_step):
        batches = feed_training(self, start_step)
        yield next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("A process that decodes images was killed")

    quiet = {"progress": False, "tensorboard": False, "num_workers": 0}
    whole = train(AREA, open_images(folder), tmp_path / "whole", **quiet)
    monkeypatch.setattr(FilesFeed, "training", ended)
    with pytest.raises(TrainingStopped, match="SIGTERM: stopped after step 1, which is saved"):
        train(AREA, open_images(folder), tmp_path / "run", **quiet)
    monkeypatch.undo()
    resumed = train(AREA, open_images(folder), tmp_path / "run", **quiet)
    assert same_weights(whole.model, resumed.model)
    # Without a signal it is one.
    monkeypatch.setattr(FilesFeed, "training", lambda self, start_step: iter(_raise()))
    with pytest.raises(RuntimeError, match="decodes"):
        train(AREA, open_images(folder), tmp_path / "other", **quiet)


def _raise():
    raise RuntimeError("A process that decodes images was killed")
    yield


def test_half_precision_is_that_of_autocast(colours, tmp_path, monkeypatch):
    recipe = replace(TINY, steps=1, log_every=1, eval_every=1, checkpoint_every=1, precision="bfloat16")
    seen = set()
    convolve = torch.nn.Conv2d.forward

    def noted(self, x):
        y = convolve(self, x)
        if self.training:
            seen.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    result = train(recipe, colours, tmp_path / "half", progress=False, tensorboard=False)
    assert torch.bfloat16 in seen
    assert all(value.dtype != torch.bfloat16 for value in result.model.state_dict().values())
    (half,) = read_metrics(tmp_path / "half" / "metrics.jsonl")
    train(
        replace(recipe, precision="float32"), colours, tmp_path / "whole", progress=False, tensorboard=False
    )
    (whole,) = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert half["loss"] != whole["loss"]
    assert half["loss"] == pytest.approx(whole["loss"], rel=0.05)
