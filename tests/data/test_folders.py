import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_sets import photograph_folder, picture, write_folder

from batchnorm.data.folders import ImageFolder, open_images
from batchnorm.data.names import Names, listing


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "set", {"bee": 7, "ape": 5, "cat": 1}, {"cat": 2, "ape": 1})


def test_every_image_has_one_number_and_the_label_of_its_folder(root):
    images = open_images(root).train
    assert images.classes == ("ape", "bee", "cat")
    assert len(images) == 13
    assert images.labels.dtype == np.int64
    names = [images.name(number) for number in range(13)]
    assert sorted(names) == sorted(str(path) for path in (root / "train").glob("*/*.jpg"))
    for number, name in enumerate(names):
        assert images.classes[images.labels[number]] == name.split("/")[-2]
        with open(name, "rb") as file:
            assert images.read(number) == file.read()


def test_validation_has_the_labels_of_training_and_may_lack_a_class(root):
    found = open_images(root)
    assert found.classes == found.val.classes == ("ape", "bee", "cat")
    assert sorted(found.val.labels.tolist()) == [0, 2, 2]
    assert found.name == str(root)


def test_numbering_mixes_classes_and_is_a_function_of_the_seed(root):
    def names(seed):
        images = ImageFolder(root / "train", seed=seed)
        return [images.name(number) for number in range(len(images))]

    assert names(3) == names(3)
    assert names(3) != names(4)
    assert sorted(names(3)) == sorted(names(4))
    assert names(0) != sorted(names(0))


@pytest.mark.parametrize(
    ("per_shard", "bounds"),
    [
        pytest.param(5, [0, 5, 10, 13], id="a rest"),
        pytest.param(13, [0, 13], id="exactly one"),
        pytest.param(1000, [0, 13], id="more than there are"),
        pytest.param(1, list(range(14)), id="one each"),
    ],
)
def test_virtual_shards(root, per_shard, bounds):
    shards = ImageFolder(root / "train", per_shard=per_shard).shards
    assert shards.dtype == np.int64
    assert shards.tolist() == bounds


def test_images_are_found_by_ending_at_any_depth_and_others_are_left(root):
    ape = root / "train" / "ape"
    (ape / "deeper" / "still").mkdir(parents=True)
    (ape / "deeper" / "still" / "x.PNG").write_bytes(picture(99, format="PNG"))
    (ape / "y.JPEG").write_bytes(picture(98))
    (ape / "z.webp").write_bytes(picture(97))
    (ape / "notes.txt").write_text("not a picture")
    (ape / "._y.JPEG").write_bytes(b"a Mac's notes")
    (ape / ".cache").mkdir()
    (ape / ".cache" / "thumb.jpg").write_bytes(picture(96))
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "list.txt").write_text("")
    images = ImageFolder(root / "train")
    assert len(images) == 16
    names = {images.relative(number) for number in range(16)}
    assert {"ape/deeper/still/x.PNG", "ape/y.JPEG", "ape/z.webp"} <= names


def test_survives_the_way_to_another_process_without_open_files(root):
    images = ImageFolder(root / "train")
    images.read(0)
    again = pickle.loads(pickle.dumps(images))
    assert [again.read(n) for n in range(13)] == [images.read(n) for n in range(13)]
    assert (again.classes, again.labels.tolist()) == (images.classes, images.labels.tolist())


def unknown_class(root):
    (root / "val" / "dog").mkdir()
    (root / "val" / "dog" / "a.jpg").write_bytes(picture(0))


def empty_class(root):
    (root / "train" / "dog").mkdir()


def class_of_other_files(root):
    (root / "train" / "dog").mkdir()
    (root / "train" / "dog" / "a.heic").write_bytes(b"")


def no_classes(root):
    for path in (root / "val").rglob("*.jpg"):
        path.rename(root / "val" / f"{path.parent.name}-{path.name}")
    for path in (root / "val").iterdir():
        if path.is_dir():
            path.rmdir()


def no_val(root):
    (root / "val").rename(root / "test")


def no_train(root):
    (root / "train").rename(root / "training")


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        pytest.param(
            unknown_class, ValueError, r"val has dog, .*\(3: ape, bee, cat\).*remove the folder", id="unknown"
        ),
        pytest.param(empty_class, ValueError, r"no image in dog \(.*dog is empty\)", id="empty class"),
        pytest.param(
            class_of_other_files, ValueError, r"no image in dog \(.*holds a.heic\).*\.webp", id="other files"
        ),
        pytest.param(no_classes, ValueError, r"val has no class folders.*CLASS/NAME\.jpg", id="no classes"),
        pytest.param(no_val, FileNotFoundError, r"no val/ \(it holds test, train\)", id="no val"),
        pytest.param(no_train, FileNotFoundError, r"no train/ \(it holds training, val\)", id="no train"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(root, spoil, error, says):
    spoil(root)
    with pytest.raises(error, match=says) as caught:
        open_images(root)
    assert str(root) in str(caught.value)


def test_absent_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder.*train-\{000000\.\.000146\}\.tar"):
        open_images(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"per_shard": 0}, "at least 1 image, got 0"), ({"seed": -1}, "not be negative, got -1")],
    ids=["no images in a shard", "negative seed"],
)
def test_impossible_arguments(root, arguments, says):
    with pytest.raises(ValueError, match=says):
        ImageFolder(root / "train", **arguments)


def test_folder_of_images_has_its_own_val(root):
    with pytest.raises(ValueError, match="its own val/"):
        open_images(root, val="val-{000000..000001}.tar")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8)))
def test_names_come_back(names):
    kept = Names(names)
    assert [kept[index] for index in range(len(kept))] == names
    for outside in (-1, len(names)):
        with pytest.raises(IndexError, match=re.escape(f"{outside} of {len(names)}")):
            kept[outside]


def test_name_that_is_no_unicode_comes_back():
    assert Names(["a\udcffb"])[0] == "a\udcffb"


def test_long_lists_are_counted():
    assert listing(["a", "b"]) == "a, b"
    assert listing(list("abcdefgh")) == "a, b, c, d, e and 3 more"


def test_photographs(tmp_path):
    found = open_images(photograph_folder(tmp_path))
    assert len(found.train) == len(found.val) == len(found.classes) == 100
    assert sorted(found.train.labels.tolist()) == list(range(100))
    assert all(found.train.read(number)[:3] == b"\xff\xd8\xff" for number in range(100))
