"""`batchnorm train` and `evaluate` for Inception: what it builds, its scale, and images on disk."""

import pytest
from image_sets import write_folder

from batchnorm.cli import main
from batchnorm.train.run import read_run


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        pytest.param(["bn-x5"], ["11,188,288", "28×28×320", "7×7×1024", "13.6·10⁶"], id="the paper's"),
        pytest.param(["bn-x5", "--heads", "1"], ["13,604,904", "heads.inception4d"], id="with a head"),
        pytest.param(["bn-x5", "--no-separable"], ["11,194,984"], id="full first convolution"),
        pytest.param(
            ["bn-x5", "--projection", "128"], ["14×14×608", "7×7×1056"], id="projections as printed"
        ),
        pytest.param(["bn-x5", "--scale", "cifar10"], ["8×8×64", "2×2×256", "10 classes"], id="small images"),
        pytest.param(["inception", "--scale=cifar10"], ["norm1", "dropout"], id="scale and value in one"),
    ],
)
def test_describe_shows_stages_and_parameters_and_trains_nothing(flags, shown, capsys):
    assert main(["train", *flags, "--describe"]) == 0
    table = capsys.readouterr().out
    for part in shown:
        assert part in table


def test_describe_has_no_table_for_the_fully_connected(capsys):
    assert main(["train", "mlp", "--describe"]) == 2
    assert "Inception recipes" in capsys.readouterr().err


def test_help_shows_the_defaults_of_the_scale(capsys):
    for scale, width in (("imagenet", "1.0"), ("cifar10", "0.25")):
        with pytest.raises(SystemExit, match="0"):
            main(["train", "bn-x30", "--scale", scale, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"Multiplies every number of channels. (default: {width})" in shown
        assert "0.045" in shown


SMALL = {
    "width": 0.05, "steps": 4, "batch-size": 6, "image-size": 32, "stem": "cifar", "learning-rate": 0.01,
    "log-every": 2, "eval-every": 4, "checkpoint-every": 4, "recalibrate-examples": 6, "workers": 0,
}  # fmt: skip
QUICK = [f"--{name}={value}" for name, value in SMALL.items()] + ["--no-tensorboard"]


def test_from_a_folder_to_scores_of_each_class(tmp_path, capsys):
    images = write_folder(tmp_path / "images", {"cat": 7, "dog": 6}, {"cat": 3, "dog": 2})
    out = tmp_path / "run"
    assert main(["train", "bn-x5", "--data", str(images), "--out", str(out), *QUICK]) == 0
    assert "on 5 test images" in capsys.readouterr().out
    recipe, facts = read_run(out)
    assert (recipe.crops, recipe.learning_rate, recipe.shuffle) == ("area", 0.01, "shards+within")
    assert (facts["name"], facts["num_train"], facts["image_shape"]) == (str(images), 13, [3, 32, 32])
    assert main(["evaluate", str(out), "--crops", "10", "--per-class", "--workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "top-1 of each class" in shown
    assert "cat" in shown
    assert len(list((out / "predictions").iterdir())) == 1


def test_scale_says_what_it_changes(tmp_path, monkeypatch, capsys, real_data):
    if not (real_data / "cifar-10-batches-py").is_dir():
        pytest.skip("no cifar-10-batches-py beside MNIST")
    flags = [
        "--width=0.05",
        "--steps=1",
        "--eval-examples=10",
        "--recalibrate-examples=32",
        "--no-tensorboard",
    ]
    monkeypatch.chdir(tmp_path)
    # A folder of another recipe's name must not confuse it.
    folders = ["--data-dir", str(real_data.absolute()), "--out", "inception"]
    assert main(["train", "bn-x30", "--scale", "cifar10", *folders, *flags]) == 0
    said = capsys.readouterr()
    assert "--scale cifar10 changes of bn-x30: " in said.err
    for change in ("stem imagenet → cifar", "image_size 224 → 32", "crops area → shift", "width 1.0 → 0.25"):
        assert change in said.err
    assert "learning_rate" not in said.err
    assert "on 10000 test images" in said.out
