"""The page of a diagnosis, as a browser shows it, and the command that writes it."""

import json

import pytest
import torch
from browsing import requests_of
from patients import batches, healthy
from torch import nn

import batchnorm as bn
from batchnorm.cli import main
from batchnorm.data import load
from batchnorm.doctor import diagnose

FACTORY = """
import sys
sys.path.insert(0, {tests!r})
from patients import Residual, batches as test_batches

def model():
    return Residual()

def pooled():
    from torch import nn

    return nn.Sequential(nn.AdaptiveAvgPool2d(8), Residual())

def batches():
    return test_batches()

def nothing():
    return 7
"""


@pytest.fixture
def sick():
    model = healthy()
    model.bn3.running_var *= 1e4
    model.conv2.bias = nn.Parameter(torch.zeros(16))
    return model


def test_chromium_shows_the_layer_of_a_clicked_finding(browser, sick, tmp_path):
    page = diagnose(sick, batches()).write_page(tmp_path / "report.html", "<b>Residual</b> & digits")
    browser.get(page.as_uri())
    assert browser.find_element("tag name", "h1").text == "<b>Residual</b> & digits"
    panel = browser.find_element("id", "panel")
    findings = browser.find_elements("css selector", ".finding")
    assert [finding.text.splitlines()[0] for finding in findings] == [
        "1. poisoned statistics (wrong)",
        "2. dead bias (note)",
    ]
    findings[1].click()
    assert panel.text.splitlines()[0] == "conv2"
    findings[0].click()
    assert panel.text.splitlines()[0] == "bn3"
    assert "BatchNorm2d, 32 channels" in panel.text
    shown = browser.find_elements("css selector", ".stop.shown")
    assert [stop.get_attribute("data-name") for stop in shown] == ["bn3"]
    assert len(panel.find_elements("css selector", "circle")) == 32
    assert len(panel.find_elements("css selector", "rect")) == 41
    names = [stop.get_attribute("data-name") for stop in browser.find_elements("css selector", ".stop")]
    assert names == ["conv1", "bn1", "conv2", "bn2", "drop", "conv3", "bn3", "hidden", "bn4", "head"]
    webdriver = pytest.importorskip("selenium.webdriver")
    webdriver.ActionChains(browser).move_to_element(
        browser.find_element("css selector", '[data-name="bn1"]')
    ).perform()
    assert panel.text.splitlines()[0] == "bn1"
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [page.as_uri()]


def test_page_of_a_healthy_network_says_so(browser, tmp_path):
    page = diagnose(healthy(), batches()).write_page(tmp_path / "report.html")
    browser.get(page.as_uri())
    assert "Nothing found." in browser.find_element("tag name", "main").text
    assert browser.get_log("browser") == []


def doctor(*arguments: str) -> int:
    return main(["doctor", "--no-progress", *map(str, arguments)])


@pytest.fixture
def factory(tmp_path, monkeypatch):
    (tmp_path / "sickroom.py").write_text(FACTORY.format(tests=__file__.rpartition("/")[0]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "as a parallel training saves it"])
def test_command_on_a_foreign_model(factory, sick, wrapped, capsys):
    sick.conv2.bias = None
    state = sick.state_dict()
    if wrapped:
        state = {"epoch": torch.tensor(3), "state_dict": {f"module.{name}": t for name, t in state.items()}}
    torch.save(state, factory / "best.pt")
    status = doctor("sickroom:model", "--weights", "best.pt", "--data", "sickroom:batches", "--out", "found")
    said = capsys.readouterr().out
    assert status == 0, said
    assert "poisoned-statistics" in said
    found = json.loads((factory / "found" / "diagnosis.json").read_text())
    assert [finding["layers"] for finding in found["findings"]] == [["bn3"]]
    assert found["findings"][0]["effect"]["closed"] > 0.8
    assert "Doctor: sickroom:model" in (factory / "found" / "report.html").read_text()


def test_command_on_a_foreign_model_and_images_by_name(factory, capsys):
    data = load("digits")
    model = nn.Sequential(nn.AdaptiveAvgPool2d(8), healthy()).eval()
    bn.recalibrate(model, (torch.from_numpy(data.train_images).unsqueeze(1) / 255).split(64))
    torch.save(model.state_dict(), factory / "best.pt")
    asked = ["sickroom:pooled", "--weights", "best.pt", "--data", "digits"]
    assert doctor(*asked, "--batch-size", "50") == 0
    assert "nothing found" in capsys.readouterr().out
    assert doctor(*asked, "--mean", "0.5") == 0
    assert "other-domain" in capsys.readouterr().out
    assert doctor("sickroom:model", "--data", "digits") == 2
    assert "batch 0: Residual fails on it: mat1 and mat2" in capsys.readouterr().err


def test_command_on_a_run_and_on_its_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--steps", "300", "--no-progress", "--no-tensorboard"]
    assert main(["train", "bn-mlp", "--out", "run", *options]) == 0
    assert doctor("run") == 0
    assert "nothing found" in capsys.readouterr().out
    assert doctor("bn-mlp", "--weights", "run/model.safetensors", "--part", "train") == 0
    assert "nothing found" in capsys.readouterr().out
    assert (tmp_path / "runs" / "doctor" / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "neither a folder with a run, nor module:factory, nor a recipe: mlp, bn-mlp"),
        (["bn-mlp"], "--weights is needed for bn-mlp"),
        (["sickroom:absent"], "sickroom has no function 'absent'; it has Residual, test_batches, model"),
        (["sickroom:nothing"], "sickroom:nothing returned int"),
        (["noroom:model"], "No module named 'noroom'"),
        (["sickroom:model"], "--data is needed"),
        (["sickroom:model", "--weights", "absent.pt"], "No such file or directory: absent.pt"),
        (["sickroom:model", "--weights", "text.pt"], "cannot be loaded safely"),
        (["sickroom:model", "--weights", "list.pt"], "holds no state dict"),
        (["sickroom:model", "--weights", "other.pt"], "does not fit Residual"),
        (["sickroom:model", "--weights", "text.safetensors"], "text.safetensors is damaged"),
        (["sickroom:model", "--data", "digits", "--mean", "1", "2"], "--mean needs 1 or 1 numbers"),
        (["sickroom:model", "--data", "digits", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_says_what_is_wrong_with_its_arguments(factory, capsys, arguments, words):
    (factory / "text.pt").write_text("hello")
    (factory / "text.safetensors").write_text("hello")
    torch.save([1, 2], factory / "list.pt")
    torch.save({"weight": torch.zeros(2)}, factory / "other.pt")
    assert doctor(*arguments) == 2
    assert words in capsys.readouterr().err
