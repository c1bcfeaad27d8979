import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from batchnorm.cli import main
from batchnorm.train import MLPRecipe
from batchnorm.train.run import read_run

QUICK = ["--steps", "30", "--hidden", "10", "10", "--eval-every", "30", "--no-progress", "--no-tensorboard"]


def test_flags_are_the_recipes_fields(tmp_path, capsys):
    out = tmp_path / "run"
    flags = [
        "--data",
        "digits",
        "--learning-rate",
        "0.25",
        "--optimizer",
        "adam",
        "--no-binarize",
        "--seed",
        "7",
    ]
    assert main(["train", "bn-mlp", *flags, "--out", str(out), *QUICK]) == 0
    recipe, facts = read_run(out)
    assert (recipe.learning_rate, recipe.optimizer, recipe.binarize, recipe.seed) == (0.25, "adam", False, 7)
    assert (recipe.hidden, recipe.steps, recipe.normalize) == ((10, 10), 30, True)
    assert recipe.batch_size == 60
    assert facts["name"] == "digits"
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"{out}: top-1 " in captured.out
    assert "on 359 test images" in captured.out

    assert main(["evaluate", str(out), str(out), "--checkpoint", "newest"]) == 0
    table = capsys.readouterr().out
    percent = captured.out.split("top-1 ")[1].split(",")[0]
    assert table.count(percent) == 3
    assert "ensemble of 2" in table
    assert main(["evaluate", str(out), "--checkpoint", "29"]) == 2
    assert "No checkpoint '29'" in capsys.readouterr().err


def test_flags_may_come_before_the_recipe(tmp_path):
    assert main(["train", "--out", str(tmp_path / "run"), "mlp", *QUICK]) == 0
    assert read_run(tmp_path / "run")[0].normalize is False


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(
            ["bn-mlp", "--lerning-rate", "1"], "--learning-rate", id="misspelt flag suggests the right one"
        ),
        pytest.param(["bn-mlpp"], "mlp, bn-mlp", id="unknown recipe lists the known"),
        pytest.param(["bn-mlp", "--steps", "many"], "--steps", id="a word for a number"),
        pytest.param(["bn-mlp", "--momentum", "3"], "at least 0 and below 1", id="a value out of range"),
        pytest.param(["bn-mlp", "--optimizer", "lion"], "sgd", id="unknown optimizer"),
    ],
)
def test_arguments_that_cannot_be_understood(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["train", *arguments, "--out", "run"])
    captured = capsys.readouterr()
    assert says in captured.out + captured.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param(
            ["train", "mlp", "--data", "cifar", "--out", "run"], "known are digits", id="unknown source"
        ),
        pytest.param(
            ["train", "mlp", "--data", "mnist", "--data-dir", "absent", "--out", "run"],
            "not a folder",
            id="no data_dir",
        ),
        pytest.param(["train", "bn-mlp"], "--out is needed", id="no folder"),
        pytest.param(["train", "bn-x5", "--out", "run"], "--data is needed", id="no images"),
        pytest.param(["train", "mlp", "--scale", "cifar10", "--out", "run"], "one scale only", id="no scale"),
        pytest.param(
            ["train", "bn-x5", "--data", "./photos", "--data-dir", ".", "--out", "run"],
            "is a place",
            id="twice",
        ),
        pytest.param(["train", "bn-x5", "--data", "digits", "--out", "run"], "of shape", id="other images"),
        pytest.param(["evaluate", "absent"], "absent is not a run", id="no run"),
        pytest.param(["evaluate"], "at least one run", id="no run named"),
    ],
)
def test_errors_are_one_message(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("batchnorm: error: ")
    assert says in message
    assert "Traceback" not in message


def test_other_recipe_in_the_same_folder(tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", "bn-mlp", "--out", out, *QUICK]) == 0
    assert main(["train", "bn-mlp", "--out", out, *QUICK, "--seed", "1"]) == 2
    assert "seed (asked for 1, there 0)" in capsys.readouterr().err


def test_help_teaches_every_field(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit, match="0"):
        main(["train", "bn-mlp", "--help"])
    shown = capsys.readouterr().out
    for field in fields(MLPRecipe):
        assert f"--{field.name.replace('_', '-')}" in shown
    assert "Step size at the start" in shown
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "batchnorm train bn-mlp --out runs/bn" in shown
    assert "Section 4.1 with Batch Normalization" in shown


def test_terminated_command_saves_says_so_and_goes_on(tmp_path):
    out = tmp_path / "run"
    program = "import sys; from batchnorm.cli import main; sys.exit(main())"
    flags = ["--hidden", "10", "--steps", "100000", "--checkpoint-every", "50", "--no-tensorboard"]
    command = [sys.executable, "-c", program, "train", "mlp", "--out", str(out), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not (out / "checkpoints" / "step-100").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert "batchnorm: SIGTERM: stopped after step" in said
    assert "Traceback" not in said
    step = int(said.rpartition("after step ")[2].partition(",")[0])
    state = json.loads((out / "checkpoints" / f"step-{step}" / "state.json").read_text())
    assert state["step"] == step
