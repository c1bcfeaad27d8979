"""USPS: found, checked, read without unpickling."""

import numpy as np
import pytest

from batchnorm.data import load


def arrays(num_train=3, num_test=2):
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (num_train, 16, 16), dtype=np.uint8),
        "y_train": random.integers(0, 10, num_train, dtype=np.uint8),
        "x_test": random.integers(0, 256, (num_test, 16, 16), dtype=np.uint8),
        "y_test": random.integers(0, 10, num_test, dtype=np.int32),
    }


@pytest.mark.parametrize("place", ["", "usps"], ids=["in the folder", "in its subfolder"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["plain", "compressed"])
def test_images_and_labels_are_the_files(tmp_path, place, save):
    (tmp_path / place).mkdir(exist_ok=True)
    expected = arrays()
    save(tmp_path / place / "usps.npz", **expected)
    data = load("usps", tmp_path)
    np.testing.assert_array_equal(data.train_images, expected["x_train"])
    np.testing.assert_array_equal(data.test_images, expected["x_test"])
    assert data.train_labels.dtype == data.test_labels.dtype == np.int64
    assert data.test_labels.tolist() == expected["y_test"].tolist()
    assert data.classes == tuple("0123456789")
    assert data.image_shape == (16, 16)


def test_in_the_frame_of_mnist(tmp_path):
    given = arrays()
    given["x_train"][0] = 200
    given["x_train"][1] = np.arange(16, dtype=np.uint8) * 10  # darker to the right
    np.savez(tmp_path / "usps.npz", **given)
    data = load("usps", tmp_path, size=28)
    assert data.image_shape == (28, 28)
    assert data.train_images.dtype == np.uint8
    outside = np.ones((28, 28), bool)
    outside[4:24, 4:24] = False
    assert not data.train_images[:, outside].any()
    assert not data.test_images[:, outside].any()
    assert (data.train_images[0, 4:24, 4:24] == 200).all()
    # Pixel i of 20 lies at 0.8 (i + 1/2) - 1/2 of 16.
    places = np.clip(0.8 * (np.arange(20) + 0.5) - 0.5, 0, 15)
    np.testing.assert_allclose(data.train_images[1, 4:24, 4:24], np.tile(10 * places, (20, 1)), atol=0.5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_test": None}, "no array 'x_test': needed are x_train, y_train, x_test, y_test"),
        (
            {"x_train": np.zeros((3, 28, 28), np.uint8)},
            r"x_train must be uint8 of shape \(N, 16, 16\), got uint8",
        ),
        ({"x_test": np.zeros((2, 16, 16), np.float32)}, "x_test must be uint8 .* got float32"),
        ({"y_train": np.zeros(3)}, "y_train must be whole numbers, got float64"),
        ({"y_test": np.array([0, 10])}, r"labels must lie in 0\.\.9"),
        ({"y_train": np.array([0, 1])}, "one for each of 3 images"),
        ({"y_train": np.array([1, 2, None], dtype=object)}, "Python objects"),
    ],
    ids=["missing", "other size", "float images", "float labels", "no digit", "other number", "objects"],
)
def test_other_arrays_are_refused(tmp_path, change, says):
    found = {name: array for name, array in (arrays() | change).items() if array is not None}
    np.savez(tmp_path / "usps.npz", **found)
    with pytest.raises(ValueError, match=says):
        load("usps", tmp_path)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"usps.npz is neither in .*np.savez: x_train \(7291, 16, 16\)"
    ):
        load("usps", tmp_path)


def test_sizes_that_usps_does_not_come_in_are_refused(tmp_path):
    np.savez(tmp_path / "usps.npz", **arrays())
    with pytest.raises(ValueError, match="usps images come in 16 pixels only, not in 24"):
        load("usps", tmp_path, size=24)


def test_the_real_ones(real_data):
    if not (real_data / "usps").is_dir():
        pytest.skip("no USPS on this machine: set BATCHNORM_DATA to a folder that holds usps/usps.npz")
    data = load("usps", real_data)
    assert (data.train_images.shape, data.test_images.shape) == ((7291, 16, 16), (2007, 16, 16))
    assert np.bincount(data.test_labels).tolist() == [359, 264, 198, 166, 200, 160, 170, 147, 166, 177]
    assert 40 < data.train_images.mean() < 90  # ink is bright on dark paper, as MNIST's
