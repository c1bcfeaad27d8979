"""``batchnorm choose``: models and data by name, a table, JSON and a page."""

import json

import pytest
import torch
from browsing import requests_of

from batchnorm.cli import main
from batchnorm.cli.choose import seconds
from batchnorm.cli.saved import call

SHORT = ["--steps", "4", "--repetitions", "2", "--rates", "0.05", "--no-progress"]

USERS = """
import torch
from torch import nn

made = 0

def network():
    global made
    made += 1
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

def trained():
    torch.manual_seed(0)
    model = network()
    model(torch.rand(50, 1, 8, 8))
    return model

def batches():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    images = torch.rand(90, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    return zip(images.split(7), labels.split(7))
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A module of the user's, in the working directory, under a name that no other test has imported."""
    name = f"mine_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    return name


def choice_of(*arguments) -> dict:
    assert main(["choose", *arguments, *SHORT]) == 0
    with open("runs/choose/choice.json") as file:
        return json.load(file)


def test_a_recipe_on_digits_prints_a_table_and_writes_a_page(tmp_path, monkeypatch, capsys, browser):
    monkeypatch.chdir(tmp_path)
    found = choice_of("bn-mlp", "--batch-size", "8")
    shown = capsys.readouterr().out
    assert "candidate" in shown
    assert found["verdict"]["sentence"] in " ".join(shown.split())
    assert "not tried: frozen" in shown
    assert {one["name"] for one in found["tried"]} == {"plain", "ghost", "renorm", "group"}
    assert (found["batch_size"], found["steps"], found["repetitions"]) == (8, 4, 2)
    assert found["num_held_out"] == 287  # a fifth of 1,438: never of the test set
    # The recipe's weights are others in every repetition.
    assert not any("every repetition starts" in note for note in found["notes"])
    page = tmp_path / "runs/choose/report.html"
    assert f"Page: {page.relative_to(tmp_path)}" in shown
    browser.get(page.as_uri())
    curves = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map("
        "  p => p.querySelectorAll('.scatterlayer .trace').length)"
    )
    assert curves == [12, 12]  # of four candidates a line and the edges of its band
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]


def test_a_users_function_and_batches(users):
    found = choice_of(
        f"{users}:network", "--data", f"{users}:batches", "--batch-size", "6", "--examples", "80"
    )
    assert found["num_held_out"] == 16  # a fifth of 80 of the 84 examples in twelve batches
    assert any(one["name"] == "frozen" for one in found["not_tried"])


def test_weights_are_where_trials_start_and_let_frozen_be_tried(users, tmp_path):
    torch.save(call(f"{users}:trained").state_dict(), tmp_path / "trained.pt")
    found = choice_of(
        f"{users}:network",
        *("--weights", "trained.pt", "--data", f"{users}:batches", "--batch-size", "6"),
        *("--candidates", "plain", "frozen", "accumulated", "--order", "given"),
    )
    assert {one["name"] for one in found["tried"]} == {"plain", "frozen", "accumulated"}
    assert any("every repetition starts from the weights" in note for note in found["notes"])


def test_a_run_has_its_weights_and_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training = "train bn-mlp --data digits --steps 5 --out run --no-tensorboard --no-progress"
    assert main(training.split()) == 0
    found = choice_of("run", "--batch-size", "16", "--examples", "200", "--candidates", "plain", "frozen")
    assert {one["name"] for one in found["tried"]} == {"plain", "frozen"}
    assert found["num_held_out"] == 40


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90s", 90), ("1.5m", 90), (".5 h", 1800), ("2h", 7200)]
)
def test_budgets_are_times(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("bn-mlp --batch-size 8 --budget soon", "--budget 'soon' is not understood: give a time such as"),
        ("bn-mlp --batch-size 8 --budget 1m --steps 3", "give either budget_s"),
        ("bn-mlp --batch-size 8 --budget .01s", "a budget of 0.01 s is too little"),
        ("bn-mlp --batch-size 5000", "too few for a batch of 5000"),
        ("bn-mlp --batch-size 8 --candidates layer", "no candidate 'layer'"),
        ("mlp --batch-size 8 --steps 2", "has no batch normalization to choose a kind of"),
        ("bn-x5 --batch-size 8", "--data is needed for bn-x5: an image folder or shards; or give --scale"),
        ("nothing --batch-size 8", "'nothing' is neither a folder with a run"),
        ("collections:OrderedDict --batch-size 8", "--data is needed"),
        (
            "collections:OrderedDict --batch-size 8 --data digits --steps 2",
            "returned OrderedDict, not a torch",
        ),
    ],
    ids=lambda value: value if value.startswith(("bn", "mlp", "no", "col")) else "",
)
def test_mistakes_are_told(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["choose", *arguments.split(), "--no-progress"]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["choose", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "or that the trials cannot tell" in shown
    assert "--batch-size INT" in shown
    assert "plain, ghost, renorm, group, frozen, synced, accumulated, evalnorm, whitened" in shown
