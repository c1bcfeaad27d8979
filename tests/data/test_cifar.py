"""CIFAR-10: its pickles are read, and nothing in a pickle is ever run."""

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from batchnorm.data import cifar, load
from batchnorm.data.cifar import read_cifar10, unpickle


def batch_of(num, seed):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (num, 3072), dtype=np.uint8)
    return pixels, random.integers(0, 10, num).tolist()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder as published, with 4 images in each file, and its checksums in place of the real ones."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for seed, name in enumerate([*cifar.TRAIN_FILES, *cifar.TEST_FILES]):
        pixels, labels = batch_of(4, seed)
        content = pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"x"}, protocol=4)
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(cifar, "TRAIN_FILES", {name: sums[name] for name in cifar.TRAIN_FILES})
    monkeypatch.setattr(cifar, "TEST_FILES", {name: sums[name] for name in cifar.TEST_FILES})
    return tmp_path


def test_images_and_labels_in_the_order_of_the_files(small):
    data = load("cifar10", small, download=False)
    expected = [batch_of(4, seed) for seed in range(6)]
    pixels = np.concatenate([pixels for pixels, _ in expected[:5]])
    assert data.train_images.shape == (20, 3, 32, 32)
    # Row by row: 1,024 red, then green, then blue.
    assert (data.train_images.reshape(20, -1) == pixels).all()
    assert data.train_images[3, 1, 2, 5] == pixels[3, 1024 + 2 * 32 + 5]
    assert data.train_labels.tolist() == [label for _, labels in expected[:5] for label in labels]
    assert (data.test_images.reshape(4, -1) == expected[5][0]).all()
    assert data.test_labels.tolist() == expected[5][1]
    assert data.image_shape == (3, 32, 32)
    assert data.classes[3] == "cat"


def test_damaged_file_is_named(small):
    path = small / "cifar-10-batches-py" / "data_batch_4"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"data_batch_4: md5 .* is damaged.*Delete"):
        load("cifar10", small, download=False)


def test_missing_file_says_where_it_is_published(small):
    (small / "cifar-10-batches-py" / "data_batch_2").unlink()
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py.*cs\.toronto\.edu"):
        load("cifar10", small, download=False)


def test_archive_is_fetched_unpacked_and_removed(small, tmp_path, monkeypatch):
    packed = tmp_path / "server" / cifar.ARCHIVE
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(small / "cifar-10-batches-py", "cifar-10-batches-py")
    asked = []

    def fetch(name, mirrors, md5, folder, *, progress):
        asked.append((name, mirrors, md5))
        folder.mkdir(parents=True)
        (folder / name).write_bytes(packed.read_bytes())
        return folder / name

    monkeypatch.setattr(cifar, "fetch", fetch)
    target = tmp_path / "cache"
    images, *_ = read_cifar10([target], target, progress=False)
    assert len(images) == 20
    assert asked == [(cifar.ARCHIVE, cifar.MIRRORS, cifar.ARCHIVE_MD5)]
    assert [path.name for path in target.iterdir()] == ["cifar-10-batches-py"]
    assert len(list((target / "cifar-10-batches-py").iterdir())) == 6
    # The second time nothing is fetched.
    read_cifar10([target], target)
    assert len(asked) == 1


class Evil:
    def __init__(self, what, arguments):
        self.what, self.arguments = what, arguments

    def __reduce__(self):
        return self.what, self.arguments


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        pytest.param(os.system, ("touch {mark}",), id="shell"),
        pytest.param(eval, ("open('{mark}', 'w')",), id="eval"),
        pytest.param(Path, ("{mark}",), id="a class"),
        pytest.param(np.save, ("{mark}", 1), id="a function of numpy"),
        pytest.param(getattr, ("{mark}", "upper"), id="a way to any function"),
        pytest.param(bytearray, (8,), id="a harmless builtin"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_pickle_runs(tmp_path, what, arguments, protocol):
    mark = tmp_path / "mark"
    filled = tuple(a.format(mark=mark) if isinstance(a, str) else a for a in arguments)
    with pytest.raises(ValueError, match="the pickle asks for"):
        unpickle(pickle.dumps({b"data": Evil(what, filled)}, protocol=protocol))
    assert not mark.exists()


def test_a_pickle_cut_short():
    whole = pickle.dumps({b"data": np.arange(1000)}, protocol=4)
    with pytest.raises(ValueError, match="not a whole pickle"):
        unpickle(whole[:200])


def test_arrays_of_objects_are_refused():
    with pytest.raises(ValueError, match=r"the pickle asks for|whole pickle"):
        unpickle(pickle.dumps(np.array([Evil(os.getcwd, ())], dtype=object), protocol=2))


@pytest.mark.parametrize("mirror", cifar.MIRRORS)
def test_mirrors_are_encrypted(mirror):
    assert mirror.startswith("https://")


def test_real_files(real_data):
    if not (real_data / "cifar-10-batches-py").is_dir():
        pytest.skip("no cifar-10-batches-py beside MNIST")
    data = load("cifar10", real_data, download=False)
    assert data.train_images.shape == (50_000, 3, 32, 32)
    assert data.test_images.shape == (10_000, 3, 32, 32)
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert np.bincount(data.test_labels).tolist() == [1000] * 10
    # The published means of the channels, on the scale from 0 to 1.
    means = data.train_images.mean((0, 2, 3)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=1e-4)
    # The first training image is a frog.
    assert data.classes[data.train_labels[0]] == "frog"
