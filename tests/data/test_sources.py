import gzip
import hashlib
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchnorm.data import SOURCES, ImageData, load, sources

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def tiny():
    random = np.random.default_rng(3)
    return {
        sources.TRAIN_IMAGES: random.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        sources.TRAIN_LABELS: random.integers(0, 10, 12, dtype=np.uint8),
        sources.TEST_IMAGES: random.integers(0, 256, (5, 28, 28), dtype=np.uint8),
        sources.TEST_LABELS: random.integers(0, 10, 5, dtype=np.uint8),
    }


def write(folder, arrays, *, zipped):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if zipped:
            (folder / name).write_bytes(gzip.compress(idx(array), mtime=0))
        else:
            (folder / name.removesuffix(".gz")).write_bytes(idx(array))


def publish(monkeypatch, name, arrays, mirrors=()):
    """Pretend that these arrays are what the source is published as."""
    md5 = {
        file: hashlib.md5(gzip.compress(idx(array), mtime=0)).hexdigest() for file, array in arrays.items()
    }
    source = replace(sources.IDX_SOURCES[name], md5=md5, mirrors=mirrors)
    monkeypatch.setitem(sources.IDX_SOURCES, name, source)


def check(data, name, arrays):
    assert data.name == name
    np.testing.assert_array_equal(data.train_images, arrays[sources.TRAIN_IMAGES])
    np.testing.assert_array_equal(data.train_labels, arrays[sources.TRAIN_LABELS])
    np.testing.assert_array_equal(data.test_images, arrays[sources.TEST_IMAGES])
    np.testing.assert_array_equal(data.test_labels, arrays[sources.TEST_LABELS])
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64


@pytest.mark.parametrize("zipped", [True, False], ids=["gzip", "plain"])
@pytest.mark.parametrize("place", ["", "fashion-mnist"], ids=["in the folder", "in its subfolder"])
def test_four_files_are_found(tmp_path, monkeypatch, tiny, place, zipped):
    publish(monkeypatch, "fashion-mnist", tiny)
    write(tmp_path / place, tiny, zipped=zipped)
    check(load("fashion-mnist", tmp_path, download=False), "fashion-mnist", tiny)


def test_own_subfolder_goes_before_the_folder_itself(tmp_path, monkeypatch, tiny):
    other = {name: array[::-1].copy() for name, array in tiny.items()}
    write(tmp_path, other, zipped=False)
    write(tmp_path / "mnist", tiny, zipped=False)
    check(load("mnist", tmp_path), "mnist", tiny)


def test_environment_variable_is_read_at_each_load(tmp_path, monkeypatch, tiny):
    write(tmp_path / "a", tiny, zipped=False)
    write(tmp_path / "b", {name: array[::-1].copy() for name, array in tiny.items()}, zipped=False)
    monkeypatch.setenv("BATCHNORM_DATA", str(tmp_path / "b"))
    first = load("mnist").train_labels
    monkeypatch.setenv("BATCHNORM_DATA", str(tmp_path / "a"))
    np.testing.assert_array_equal(load("mnist").train_labels, first[::-1])
    # An argument goes before the variable.
    np.testing.assert_array_equal(load("mnist", tmp_path / "b").train_labels, first)


def test_import_needs_no_extra_and_reads_no_variable():
    program = (
        "import os, sys\n"
        "os.environ = type('Watched', (dict,), {'get': lambda *a: sys.exit('read ' + a[1])})()\n"
        "import batchnorm.data.sources, batchnorm.data.fetch\n"
        "assert not {'sklearn', 'pooch', 'rich'} & set(sys.modules)\n"
    )
    # torch and numpy read variables of their own, so they come first.
    subprocess.run([sys.executable, "-c", "import torch, batchnorm.data.batches\n" + program], check=True)


def test_gzip_of_another_data_set_is_refused(tmp_path, monkeypatch, tiny):
    publish(monkeypatch, "mnist", tiny)
    write(tmp_path, {name: array[::-1].copy() for name, array in tiny.items()}, zipped=True)
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte\.gz: md5 .* damaged or belongs to another"
    ):
        load("mnist", tmp_path)


def test_missing_file_without_download_says_where_to_put_it(tmp_path, tiny):
    del tiny[sources.TEST_LABELS]
    write(tmp_path, tiny, zipped=False)
    with pytest.raises(FileNotFoundError, match="t10k-labels") as caught:
        load("mnist", tmp_path, download=False)
    assert str(tmp_path / "mnist") in str(caught.value)
    assert "https://" in str(caught.value)


def test_no_network_says_where_to_put_the_file_and_leaves_the_others(tmp_path, monkeypatch, tiny):
    publish(monkeypatch, "mnist", tiny, mirrors=("http://127.0.0.1:9/",))
    write(tmp_path, {sources.TRAIN_IMAGES: tiny[sources.TRAIN_IMAGES]}, zipped=True)
    before = (tmp_path / sources.TRAIN_IMAGES).read_bytes()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/train-labels") as caught:
        load("mnist", tmp_path)
    assert str(tmp_path / "mnist" / sources.TRAIN_LABELS) in str(caught.value)
    assert (tmp_path / sources.TRAIN_IMAGES).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(
            {sources.TRAIN_LABELS: np.zeros(11, np.uint8)}, "one for each of 12 images", id="a label short"
        ),
        pytest.param({sources.TEST_LABELS: np.full(5, 10, np.uint8)}, r"0\.\.9", id="label 10"),
        pytest.param(
            {sources.TRAIN_IMAGES: np.zeros((12, 784), np.uint8)}, r"\(N, H, W\)", id="flattened images"
        ),
        pytest.param(
            {sources.TEST_IMAGES: np.zeros((5, 8, 8), np.uint8)}, "both must be the same", id="other pixels"
        ),
        pytest.param(
            {
                sources.TEST_IMAGES: np.zeros((0, 28, 28), np.uint8),
                sources.TEST_LABELS: np.zeros(0, np.uint8),
            },
            "not empty",
            id="empty test set",
        ),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, tiny, change, says):
    write(tmp_path, tiny | change, zipped=False)
    with pytest.raises(ValueError, match=says):
        load("mnist", tmp_path)


def test_unknown_source_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"cifar100.*digits, mnist, fashion-mnist"):
        load("cifar100")
    assert SOURCES == ("digits", "mnist", "fashion-mnist", "usps", "cifar10")


def test_data_dir_that_is_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_dir is .*absent"):
        load("mnist", tmp_path / "absent")


def test_size_of_idx_sources_is_fixed(tmp_path, tiny):
    write(tmp_path, tiny, zipped=False)
    with pytest.raises(ValueError, match="28 pixels only, not in 14"):
        load("mnist", tmp_path, size=14)


def test_digits_split_is_stratified_disjoint_and_the_same_each_time():
    from sklearn.datasets import load_digits

    data = load("digits", size=8)
    scans, labels = load_digits(return_X_y=True)
    assert len(data.train_images) == 1438
    assert len(data.test_images) == 359
    np.testing.assert_array_equal(np.bincount(data.test_labels), np.round(0.2 * np.bincount(labels)))
    # At 8 pixels nothing is interpolated: levels 0..16 become 0..255, and every scan is in one part.
    rows = np.concatenate([data.train_images, data.test_images]).reshape(1797, 64)
    expected = np.round(scans * 255 / 16).astype(np.uint8)
    np.testing.assert_array_equal(sorted(map(bytes, rows)), sorted(map(bytes, expected)))
    np.testing.assert_array_equal(load("digits", size=8).test_images, data.test_images)


def test_digits_are_upscaled_bilinearly():
    small, large = load("digits", size=8), load("digits")
    assert large.image_shape == (28, 28)
    np.testing.assert_array_equal(small.train_labels, large.train_labels)
    # Pixel centres: target column x lies at (x + 0.5) * 8 / 28 - 0.5 of the source, clamped to its edge.
    at = np.clip((np.arange(28) + 0.5) * 8 / 28 - 0.5, 0, 7)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, 7), at - low
    image = small.test_images[0] * (16 / 255)
    image = np.round(image) * (255 / 16)
    rows = image[low] * (1 - share[:, None]) + image[high] * share[:, None]
    expected = rows[:, low] * (1 - share) + rows[:, high] * share
    assert np.abs(large.test_images[0] - expected).max() <= 0.5 + 1e-4


def test_digits_need_a_pixel():
    with pytest.raises(ValueError, match="at least 1 pixel"):
        load("digits", size=0)


def test_wrong_dtype_is_refused():
    images, labels = np.zeros((2, 4, 4)), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="uint8"):
        ImageData("x", images, labels, images, labels, ("a",))


@pytest.mark.skipif(
    not (REAL / "mnist").is_dir(), reason=f"no real MNIST files in {REAL.name}/mnist beside the project"
)
def test_real_mnist():
    data = load("mnist", REAL, download=False)
    assert data.train_images.shape == (60000, 28, 28)
    assert data.test_images.shape == (10000, 28, 28)
    # The first training example is the well-known five; the mean grey level is 0.1307 of white.
    np.testing.assert_array_equal(data.train_labels[:8], [5, 0, 4, 1, 9, 2, 1, 3])
    assert data.train_images.mean() / 255 == pytest.approx(0.1307, abs=5e-5)


def test_data_by_name_need_no_decoder():
    """Pillow comes with an extra; images in memory, and training on them, do without."""
    program = "import sys; sys.modules['PIL'] = None; import batchnorm.data, batchnorm.train"
    subprocess.run([sys.executable, "-c", program], check=True)
