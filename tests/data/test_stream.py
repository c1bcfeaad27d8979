import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from image_sets import photograph_folder, picture, write_folder

from batchnorm.data.batches import shuffled_order, step_indices
from batchnorm.data.crops import Crop, evaluation_crops, random_area_box
from batchnorm.data.decode import read_crop, read_crops
from batchnorm.data.folders import ImageFolder, open_images
from batchnorm.data.pack import pack
from batchnorm.data.steps import BadImages
from batchnorm.data.stream import evaluation_stream, training_stream


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of 24 and 7 images as ``set``, and its shards of five as ``shards``."""
    base = tmp_path_factory.mktemp("stream")
    source = write_folder(base / "set", {"ape": 9, "bee": 8, "cat": 7}, {"ape": 3, "bee": 2, "cat": 2})
    pack(source, base / "shards", per_shard=5, progress=False)
    return base


def train(images, steps=4, start=0, batch=6, **more):
    arguments = {"size": 16, "seed": 3, **more}
    with training_stream(images, start_step=start, num_steps=steps, batch_size=batch, **arguments) as stream:
        return list(stream)


def joined(batches):
    """Image numbers in order, and pixels and labels by epoch-free position."""
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def assert_same(some, others):
    some, others = list(some), list(others)
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def reference_crop(images, seed, epoch, number, size):
    """What the documentation promises, in its own words."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, epoch, number]))

    def choose(width, height):
        mirrored = rng.random() < 0.5
        return Crop(random_area_box(width, height, rng), mirrored)

    return read_crop(images.read(number), choose, size)


@pytest.mark.parametrize("shuffle", ["all", "shards+within", "shards", "within", "none"])
def test_a_step_is_its_images_cropped_by_seed_epoch_and_number(base, shuffle):
    images = open_images(base / "shards").train
    for step, batch in enumerate(train(images, steps=6, shuffle=shuffle)):
        epoch, numbers = step_indices(step, 6, 24, 3, images.shards, shuffle)
        assert epoch == step // 4
        assert batch.numbers.tolist() == numbers.tolist()
        assert batch.numbers.dtype == batch.labels.dtype == torch.int64
        assert batch.labels.tolist() == images.labels[numbers.numpy()].tolist()
        wanted = np.stack([reference_crop(images, 3, epoch, int(n), 16) for n in numbers])
        assert batch.images.dtype == torch.uint8
        np.testing.assert_array_equal(batch.images.numpy(), wanted)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_number_of_workers_changes_nothing(base, num_workers):
    images = open_images(base / "set").train
    assert_same(train(images, 7, 2), train(images, 7, 2, num_workers=num_workers))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_divide_each_step_in_order(base, world_size):
    images = open_images(base / "set").train
    ranks = [train(images, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert_same(train(images), [joined(parts) for parts in zip(*ranks, strict=True)])
    sizes = {len(batch.images) for rank in ranks for batch in rank}
    assert sizes == {6 // world_size} if 6 % world_size == 0 else {1, 2}


def test_every_other_step(base):
    images = open_images(base / "set").train
    assert_same(train(images, 8)[1::2], train(images, 4, 1, stride=2))


def test_any_step_may_be_the_first(base):
    images = open_images(base / "set").train
    whole = train(images, 12)
    for start in (0, 1, 3, 4, 9):
        assert_same(whole[start:], train(images, 12 - start, start, num_workers=2))
    assert train(images, 0, 5) == []


def test_mirroring_may_be_left_out_and_the_boxes_stay(base):
    images = open_images(base / "set").train
    mirrored, plain = joined(train(images)), joined(train(images, mirror=False))
    assert torch.equal(mirrored[2], plain[2])
    # Resizing rounds alike from either side, up to one level.
    turned = [
        (a.int() - b.flip(2).int()).abs().max() <= 1 for a, b in zip(mirrored[0], plain[0], strict=True)
    ]
    same = [torch.equal(a, b) for a, b in zip(mirrored[0], plain[0], strict=True)]
    assert all(one != other for one, other in zip(turned, same, strict=True))
    assert 4 < sum(turned) < 20


def test_epochs_and_seeds_differ_in_order_and_pixels(base):
    images = open_images(base / "set").train
    whole = train(images, 8)
    epochs = [joined(whole[:4]), joined(whole[4:])]
    assert [sorted(epoch[2].tolist()) for epoch in epochs] == [list(range(24))] * 2
    assert epochs[0][2].tolist() != epochs[1][2].tolist()
    other = joined(train(images, 4, seed=4))
    assert other[2].tolist() != epochs[0][2].tolist()
    pictures = [dict(zip(numbers.tolist(), pixels, strict=True)) for pixels, _, numbers in [*epochs, other]]
    for one, two in ((0, 1), (0, 2)):
        same = [n for n in range(24) if torch.equal(pictures[one][n], pictures[two][n])]
        assert same == []


def test_folder_and_default_shards_give_the_same_bits(base, tmp_path):
    pack(base / "set", tmp_path / "shards", progress=False)
    folder, shards = open_images(base / "set"), open_images(tmp_path / "shards")
    assert_same(train(folder.train, 9), train(shards.train, 9))
    assert_same(
        evaluation_stream(folder.val, size=16, batch_size=2),
        evaluation_stream(shards.val, size=16, batch_size=2),
    )


def test_starting_a_stream_draws_nothing_from_the_generator_of_training(base):
    images = open_images(base / "set").train
    before = torch.get_rng_state()
    train(images, 2, num_workers=1)
    train(images, 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("crops", [1, 10, 144])
def test_evaluation_cuts_the_fixed_crops_of_every_image(base, crops):
    images = open_images(base / "set").val
    batches = list(evaluation_stream(images, size=8, crops=crops, batch_size=3))
    assert [len(batch.labels) for batch in batches] == [3, 3, 1]
    pixels, labels, numbers = joined(batches)
    assert numbers.tolist() == list(range(7))
    assert labels.tolist() == images.labels.tolist()
    for number in range(7):
        wanted = read_crops(images.read(number), lambda w, h: evaluation_crops(w, h, crops, 8), 8)
        np.testing.assert_array_equal(pixels[number].numpy(), wanted)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_evaluation_sees_every_image_once_over_the_ranks(base, world_size, num_workers):
    images = open_images(base / "shards").val
    ranks = [
        list(
            evaluation_stream(
                images, size=8, batch_size=2, rank=rank, world_size=world_size, num_workers=num_workers
            )
        )
        for rank in range(world_size)
    ]
    numbers = [n for rank in ranks for batch in rank for n in batch.numbers.tolist()]
    assert numbers == list(range(7))
    counts = [sum(len(batch.labels) for batch in rank) for rank in ranks]
    assert max(counts) - min(counts) <= 1


def with_bad(tmp_path, spoilt, num=200):
    """An image set of ``num`` pictures where those of the given numbers are spoilt."""
    source = write_folder(tmp_path / "set", {"ape": num // 2, "bee": num // 2})
    images = ImageFolder(source / "train")
    for number, content in spoilt.items():
        os.unlink(images.name(number))
        if content is not None:
            with open(images.name(number), "wb") as file:
                file.write(content)
    return images


CUT = picture(1)[:-200]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_image_is_named_once_and_the_next_good_one_stands_in(tmp_path, num_workers):
    # The last two: after them comes the first.
    images = with_bad(tmp_path, {198: b"", 199: CUT})
    with training_stream(
        images, start_step=0, num_steps=20, batch_size=20, size=8, seed=0, num_workers=num_workers
    ) as stream:
        batches = list(stream)
        assert len(stream.bad) == 2
        assert {entry.partition(":")[0] for entry in stream.bad} == {images.name(198), images.name(199)}
        assert any("empty file" in entry for entry in stream.bad)
        # 400 drawn; each epoch, 198 is tried, then 199 for it; 199 for itself.
        assert stream.num_seen == 400 + 2 * 3
    pixels, labels, numbers = joined(batches)
    for epoch in range(2):
        part = slice(200 * epoch, 200 * (epoch + 1))
        drawn = shuffled_order(epoch, 0, images.shards)
        assert numbers[part].tolist() == [0 if n >= 198 else n for n in drawn.tolist()]
        assert labels[part].tolist() == images.labels[numbers[part].numpy()].tolist()
        zeros = [i for i in range(200) if numbers[part][i] == 0]
        assert len(zeros) == 3
        wanted = reference_crop(images, 0, epoch, 0, 8)
        for i in zeros:
            np.testing.assert_array_equal(pixels[part][i].numpy(), wanted)


def test_file_that_went_away_is_a_bad_image(tmp_path):
    images = with_bad(tmp_path, {5: None})
    stream = training_stream(images, start_step=0, num_steps=10, batch_size=20, size=8, seed=0)
    assert len(list(stream)) == 10
    assert stream.bad == [f"{images.name(5)}: cannot be read (No such file or directory)"]


def test_image_of_a_shard_is_named_by_shard_and_source(tmp_path):
    write_folder(tmp_path / "set", {"ape": 60, "bee": 60})
    (tmp_path / "set" / "train" / "bee" / "007.jpg").write_bytes(CUT)
    pack(tmp_path / "set", tmp_path / "shards", progress=False)
    images = open_images(tmp_path / "shards").train
    stream = training_stream(images, start_step=0, num_steps=6, batch_size=20, size=8, seed=0)
    list(stream)
    (entry,) = stream.bad
    assert entry.startswith(f"{tmp_path}/shards/train-000000.tar:")
    assert "-bee_007.jpg: " in entry


@pytest.mark.parametrize("num_workers", [0, 1])
def test_more_than_one_in_a_hundred_stops_with_the_list(tmp_path, num_workers):
    images = with_bad(tmp_path, dict.fromkeys((10, 50, 90), CUT))
    stream = training_stream(
        images, start_step=0, num_steps=10, batch_size=20, size=8, seed=0, num_workers=num_workers
    )
    with pytest.raises(BadImages, match=r"3 bad images among \d+ of 200, more than 1\.0%:\n") as caught:
        list(stream)
    assert all(f"\n  {images.name(number)}: " in str(caught.value) for number in (10, 50, 90))
    assert list(stream) == []
    # As many are put up with as one says.
    stream = training_stream(images, start_step=0, num_steps=10, batch_size=20, size=8, seed=0, max_bad=0.02)
    assert len(list(stream)) == 10


def test_many_bad_ones_of_a_large_set_stop_it_early(tmp_path):
    """Each thirtieth of 1500 is bad: at the tenth, 280 drawn and 10 more in their place, that is plain."""
    images = with_bad(tmp_path, dict.fromkeys(range(0, 1500, 30), b""), num=1500)
    stream = training_stream(
        images, start_step=0, num_steps=150, batch_size=10, size=8, seed=0, shuffle="none"
    )
    with pytest.raises(BadImages, match=r"10 bad images among 290 of 1500"):
        list(stream)


def test_nothing_but_bad_images(tmp_path):
    images = with_bad(tmp_path, dict.fromkeys(range(4), b"x"), num=4)
    with pytest.raises(BadImages, match=r"None of the 4 images can be decoded: .*begins with b'x'"):
        train(images, 1, batch=2, max_bad=1.0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_leaves_bad_images_out_and_counts_them(tmp_path, num_workers):
    images = with_bad(tmp_path, {0: b"", 1: CUT})
    stream = evaluation_stream(images, size=8, batch_size=2, num_workers=num_workers)
    _, labels, numbers = joined(stream)
    assert numbers.tolist() == list(range(2, 200))
    assert labels.tolist() == images.labels[2:].tolist()
    assert [entry.partition(":")[0] for entry in stream.bad] == [images.name(0), images.name(1)]
    assert stream.num_seen == 200


def test_evaluation_of_a_bad_set_stops(tmp_path):
    images = with_bad(tmp_path, dict.fromkeys((0, 1, 2), CUT))
    with pytest.raises(BadImages, match="3 bad images among 3 of 200"):
        list(evaluation_stream(images, size=8, batch_size=1))


class Broken:
    """An image set with a defect."""

    def __init__(self, images, number):
        self.images, self.number = images, number
        self.classes, self.labels, self.shards = images.classes, images.labels, images.shards

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return self.images.name(index)

    def read(self, index):
        return self.images.read(index) if index != self.number else 1 / 0


class Deadly(Broken):
    def read(self, index):
        if index == self.number:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images.read(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_defect_reaches_the_main_process_with_the_images_name(base, num_workers):
    images = Broken(open_images(base / "set").train, 11)
    with pytest.raises(RuntimeError) as caught:
        train(images, num_workers=num_workers)
    assert str(caught.value) == f"{images.name(11)}: ZeroDivisionError: division by zero"
    assert "in read" in "".join(caught.value.__notes__)


def test_worker_that_is_killed_is_told(base):
    images = Deadly(open_images(base / "set").train, 11)
    with pytest.raises(RuntimeError, match=r"A process that decodes images was killed.*fewer workers"):
        train(images, num_workers=1)


def test_stream_that_is_closed_is_at_its_end(base):
    images = open_images(base / "set").train
    stream = training_stream(images, start_step=0, num_steps=4, batch_size=6, size=8, seed=0, num_workers=1)
    next(stream)
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param({"num_parts": 0}, "at least 1, got 0 and 1", id="no micro-batch"),
        pytest.param({"stride": 0}, "at least 1, got 1 and 0", id="no stride"),
        pytest.param({"batch_size": 25}, "between 1 and the 24", id="batch larger than the set"),
        pytest.param({"start_step": -1}, "counted from 0", id="step before the first"),
        pytest.param({"num_steps": -1}, "num_steps must not be negative, got -1", id="negative steps"),
        pytest.param({"rank": 1}, "from 0 to world_size - 1 = 0, got 1", id="rank outside"),
        pytest.param({"size": 0}, "at least 1 pixel, got 0", id="no pixels"),
        pytest.param({"num_workers": -1}, "not be negative, got -1", id="negative workers"),
    ],
)
def test_impossible_training(base, arguments, says):
    usual = {"start_step": 0, "num_steps": 1, "batch_size": 6, "size": 8, "seed": 0}
    with pytest.raises(ValueError, match=says):
        training_stream(open_images(base / "set").train, **{**usual, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param({"crops": 5}, "1, 10 or 144", id="five crops"),
        pytest.param({"batch_size": 0}, "at least 1 image, got 0", id="empty batch"),
        pytest.param({"rank": -1}, "from 0 to world_size", id="rank outside"),
    ],
)
def test_impossible_evaluation(base, arguments, says):
    with pytest.raises(ValueError, match=says):
        evaluation_stream(open_images(base / "set").val, **{"size": 8, **arguments})


KILLED = """
import json, multiprocessing, sys
from batchnorm.data.folders import open_images
from batchnorm.data.stream import training_stream

if __name__ == "__main__":
    source, batch_size, seed, size = json.loads(sys.argv[1])
    stream = training_stream(
        open_images(source).train, start_step=0, num_steps=1000, batch_size=batch_size, size=size, seed=seed,
        num_workers=2,
    )
    for step, batch in enumerate(stream):
        pids = [child.pid for child in multiprocessing.active_children()]
        numbers, total = batch.numbers.tolist(), batch.images.sum().item()
        told = {"step": step, "numbers": numbers, "sum": total, "pids": pids}
        print(json.dumps(told), flush=True)
"""


def killed_after(lines, tmp_path, *arguments):
    """What a process told of its steps before it was killed."""
    program = tmp_path / "killed.py"
    program.write_text(KILLED)
    command = [sys.executable, program, json.dumps(arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        told = [json.loads(process.stdout.readline()) for _ in range(lines)]
        process.kill()
        # What it had told by then counts as well; a line may be cut short.
        rest = process.stdout.read().split("\n")
    assert process.returncode == -signal.SIGKILL
    return told + [json.loads(line) for line in rest[:-1]]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_killed_in_mid_epoch_goes_on_without_repeat_or_loss(base, tmp_path):
    source = str(base / "shards")
    told = killed_after(6, tmp_path, source, 5, 9, 16)
    # 24 images in batches of five: four steps in an epoch, and 6 told at least.
    resumed = len(told)
    assert [line["step"] for line in told] == list(range(resumed))
    end = (resumed // 4 + 2) * 4
    images = open_images(source).train
    rest = train(images, end - resumed, resumed, 5, seed=9, num_workers=2)
    whole = train(images, end, 0, 5, seed=9)
    numbers = [line["numbers"] for line in told] + [batch.numbers.tolist() for batch in rest]
    assert numbers == [batch.numbers.tolist() for batch in whole]
    for epoch in range(end // 4):
        seen = Counter(n for step in numbers[4 * epoch : 4 * epoch + 4] for n in step)
        assert len(seen) == 20
        assert set(seen.values()) == {1}
    sums = [line["sum"] for line in told] + [batch.images.sum().item() for batch in rest]
    assert sums == [batch.images.sum().item() for batch in whole]

    workers = told[0]["pids"]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_photographs_are_the_same_from_folder_and_shards_for_any_ranks_and_workers(tmp_path):
    source = photograph_folder(tmp_path / "set")
    pack(source, tmp_path / "shards", per_shard=30, progress=False)
    folder, shards = (open_images(tmp_path / name).train for name in ("set", "shards"))
    usual = {"steps": 12, "batch": 12, "size": 64, "seed": 1}
    whole = train(folder, **usual)
    for epoch in (whole[:8], whole[8:]):
        numbers = joined(epoch)[2].tolist()
        assert len(set(numbers)) == len(numbers)
    for images in (folder, shards):
        for world_size in (1, 2, 3):
            ranks = [
                train(images, **usual, rank=r, world_size=world_size, num_workers=2)
                for r in range(world_size)
            ]
            assert_same(whole, [joined(parts) for parts in zip(*ranks, strict=True)])


def test_photographs_survive_a_kill_in_mid_epoch(tmp_path):
    photograph_folder(tmp_path / "set")
    told = killed_after(3, tmp_path, str(tmp_path / "set"), 12, 1, 64)
    images = open_images(tmp_path / "set").train
    resumed = len(told)
    rest = train(images, 8, resumed, 12, seed=1, size=64, num_workers=2)
    numbers = [line["numbers"] for line in told] + [batch.numbers.tolist() for batch in rest]
    wanted = [step_indices(step, 12, 100, 1)[1].tolist() for step in range(resumed + 8)]
    assert numbers == wanted
    first = [n for step in numbers[:8] for n in step]
    assert len(set(first)) == 96


def test_photographs_evaluated_once_each_over_ranks_and_workers(tmp_path):
    source = photograph_folder(tmp_path / "set")
    images = open_images(source).val
    seen = [
        number
        for rank in range(3)
        for batch in evaluation_stream(images, size=32, batch_size=8, rank=rank, world_size=3, num_workers=2)
        for number in batch.numbers.tolist()
    ]
    assert seen == list(range(100))
