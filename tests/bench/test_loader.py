"""The loaders that are compared: the same crops by all, photographs not needed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from batchnorm.bench import loader
from batchnorm.cli import bench, main


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of two classes, shading without grain, so that JPEG alters little."""
    rng = np.random.default_rng(0)
    for number in range(7):
        width, height = rng.integers(40, 90, 2)
        y, x = np.mgrid[:height, :width]
        pixels = np.stack([2 * x + 10 * number, 2 * y, 200 - x - y], axis=-1).clip(0, 255).astype(np.uint8)
        place = tmp_path / "images" / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number}.jpg", quality=95, subsampling=0)
    return tmp_path / "images"


def test_all_contenders_give_the_same_batches(folder):
    images = loader.ImageFolder(folder)
    plan = loader._Plan(24, 3, 4)
    ours, plain, as_float = (
        torch.stack(list(batches))
        for batches in (plan.ours(images), plan.plain(images), plan.plain(images, as_float=True))
    )
    assert ours.shape == (4, 3, 3, 24, 24)
    assert ours.dtype == plain.dtype == torch.uint8
    # Only at a box's border do they differ: ours sees the pixels outside.
    assert (ours.float() - plain.float()).abs().median() <= 1
    assert (ours.float() - plain.float()).abs().mean() < 1.5
    torch.testing.assert_close(as_float, plain.float() / 255)
    # Two batches an epoch; the second epoch has other crops.
    assert not torch.equal(ours[:2], ours[2:])


def test_figures_are_of_what_was_asked(folder):
    found = loader.measure(folder, size=16, batch=32, num_images=10, rounds=2)
    assert found["images"] == "14 crops of 7 images, 16×16, in batches of 7"
    rates = {name: median for name, (median, _, _) in found["images_per_s"].items()}
    assert list(rates) == [loader.FOLDER, loader.SHARDS, loader.PLAIN, loader.PLAIN_FLOAT]
    ratio = found["ratios"][f"{loader.FOLDER}, over {loader.PLAIN}"]
    assert ratio == pytest.approx(rates[loader.FOLDER] / rates[loader.PLAIN], rel=0.01)
    ratio = found["ratios"][f"{loader.SHARDS}, over {loader.FOLDER}"]
    assert ratio == pytest.approx(rates[loader.SHARDS] / rates[loader.FOLDER], rel=0.01)
    assert 0 <= found["difference_levels"] < 1.5


def test_rates_turn_quartiles_around():
    timing = loader.Timing(2.0, 1.0, 4.0, 9)
    assert loader._Plan(8, 4, 5).rates(timing) == [10.0, 5.0, 20.0]


def test_a_folder_divided_into_training_and_validation(folder, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    folder.rename(whole / "train")
    (whole / "val").mkdir()
    assert loader.measure(whole, size=8, num_images=1, rounds=2)["images"].startswith("7 crops of 7 images")


def test_bad_images_are_not_measured(folder):
    (folder / "class0" / "bad.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.jpg.*must be whole"):
        loader.measure(folder, size=8, num_images=1, rounds=2)


def test_the_command_measures_and_writes(folder, tmp_path, capsys):
    out = tmp_path / "loader.json"
    flags = ["--size", "16", "--images", "4", "--rounds", "2", "--out", str(out)]
    assert main(["bench", "loader", "--data", str(folder), *flags]) == 0
    (occasion,) = json.loads(out.read_text())["occasions"]
    assert occasion["kind"] == "loader"
    assert occasion["settings"] == {"threads": 1}
    assert set(occasion["results"]["images_per_s"]) == {
        loader.FOLDER,
        loader.SHARDS,
        loader.PLAIN,
        loader.PLAIN_FLOAT,
    }
    assert "one core" in capsys.readouterr().out


def test_a_folder_must_be_given(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "loader"])
    assert "--data" in capsys.readouterr().err


def test_an_absent_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        loader.measure(tmp_path / "absent")


def test_the_table_shows_every_contender():
    rates, ratios = bench.TABLES["loader"](
        {
            "images": "n",
            "images_per_s": {"a": [3.0, 2.0, 4.0], "b": [1.0, 1.0, 1.0]},
            "ratios": {"a over b": 3.0},
            "difference_levels": 0.1,
        }
    )
    assert rates.row_count == 2
    assert ratios.row_count == 1
