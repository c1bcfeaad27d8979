"""The bench of kinds: right numbers first, fair turns, ratios within a round, a file and a table."""

import json

import pytest
import torch

from batchnorm.bench import kinds
from batchnorm.cli import bench, main
from batchnorm.layers import BatchNorm2d


def test_the_command_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "k.json"
    given = ["--shapes", "6", "4", "3", "3", "--ghost-size", "2", "--rounds", "3", "--memory", "default"]
    assert main(["bench", "kinds", *given, "--layouts", "channels_last", "--out", str(out)]) == 0
    (occasion,) = json.loads(out.read_text())["occasions"]
    assert occasion["settings"] == {"threads": 1, "rounds": 3}
    (row,) = occasion["results"]
    assert (row["shape"], row["layout"], row["memory"]) == ([6, 4, 3, 3], "channels_last", "default")
    assert list(row["ms"]) == list(row["ratio"]) == list(kinds.CONTENDERS)
    assert row["ratio"]["plain"] == row["ratio_cpu"]["plain"] == [1, 1, 1]
    assert all(low <= median <= high for median, low, high in row["ms"].values())
    assert "ghosts of 2" in capsys.readouterr().out
    assert len(bench.TABLES["kinds"]([row, row])) == 2


def test_ratios_are_of_the_same_round():
    assert kinds._over([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == [3.0, 2.0, 4.0]


def test_wrong_numbers_are_not_timed(monkeypatch):
    wrong = {**kinds.CONTENDERS, kinds.GHOST: lambda channels, ghost_size: BatchNorm2d(channels)}
    monkeypatch.setattr(kinds, "CONTENDERS", wrong)
    with pytest.raises(RuntimeError, match="the numbers of ghost are wrong"):
        kinds._measure((8, 3, 2, 2), "contiguous", 2, 2)


def test_the_loop_is_over_virtual_batches():
    x = torch.randn(7, 3, 2, 2)
    y = kinds._Loop(BatchNorm2d(3), 4)(x)
    for part in (slice(0, 4), slice(4, 7)):
        torch.testing.assert_close(y[part], BatchNorm2d(3)(x[part]))
