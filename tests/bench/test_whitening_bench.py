"""The bench of whitening: right numbers first, ratios within a round, a file and a table."""

import json

import pytest
import torch

from batchnorm.bench import whitening
from batchnorm.cli import bench, main


def test_the_command_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "w.json"
    given = ["--channels", "8", "--groups", "1", "4", "64", "--batch", "4", "--side", "3", "--rounds", "2"]
    assert main(["bench", "whitening", *given, "--out", str(out)]) == 0
    (occasion,) = json.loads(out.read_text())["occasions"]
    (row,) = occasion["results"]
    assert (row["shape"], row["iterations"]) == ([4, 8, 3, 3], 5)
    assert list(row["ms"]) == list(row["ratio"]) == ["plain", "newton 1", "zca 1", "newton 4", "zca 4"]
    assert row["ratio"]["plain"] == row["ratio_cpu"]["plain"] == [1, 1, 1]
    assert "newton 4" in capsys.readouterr().out
    assert len(bench.TABLES["whitening"]([row, row])) == 2


def test_wrong_numbers_are_not_timed(monkeypatch):
    monkeypatch.setattr(whitening, "_by_eigenvectors", lambda group: torch.tanh)
    with pytest.raises(RuntimeError, match="whiten groups of 2 differently"):
        whitening._measure(4, [2], 4, 3, 5, 2)
