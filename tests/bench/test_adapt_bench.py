"""What adapting costs: every contender is timed, and shares are those of its rival."""

import json

import pytest

from batchnorm.bench import adapt
from batchnorm.bench.timing import Timing
from batchnorm.cli import bench, main


def test_throughputs_are_inferences_seconds_over_the_contenders(monkeypatch):
    def timed(calls, rounds):
        for call in calls.values():
            call()
        return {name: Timing(1.0 + place, 0.5, 2.0, rounds) for place, name in enumerate(calls)}

    monkeypatch.setattr(adapt, "in_turns", timed)
    found = adapt._measure("experiment", 8, 8, 3)
    assert found["throughput"] == {
        "inference": 1.0,
        "adapt": 0.5,
        "adapt, statistics alone": 0.333,
        "inference of one batch": 1.0,
        "adapt, blended, one batch": pytest.approx(4 / 5, abs=1e-3),
        "adapt, entropy, one batch": pytest.approx(4 / 6, abs=1e-3),
        "inference with an alarm": pytest.approx(1 / 7, abs=1e-3),
    }


def test_the_command_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "a.json"
    small = "--networks resnet --batch 8 --batches 8 --rounds 2"
    assert main(["bench", "adapt", *small.split(), "--out", str(out)]) == 0
    (occasion,) = json.loads(out.read_text())["occasions"]
    assert occasion["settings"] == {"threads": 1, "rounds": 2}
    (found,) = occasion["results"]
    assert found["network"] == "residual network of 9 convolutions, torch's layers, 32×32, 8 batches of 8"
    assert found["throughput"]["inference"] == 1.0
    assert all(low <= median <= high for median, low, high in found["seconds"].values())
    assert "throughput" in capsys.readouterr().out
    (table,) = bench.TABLES["adapt"](occasion["results"])
    assert table.row_count == 7
