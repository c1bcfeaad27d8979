"""What recurrent layers cost: contenders compute one thing, and ratios are to their rival."""

import json

import torch

from batchnorm.bench import recurrent
from batchnorm.bench.timing import Timing
from batchnorm.cli import bench, main


def test_ratios_are_to_torchs_layer_and_to_step_by_step(monkeypatch):
    def timed(calls, rounds):
        for call in calls.values():
            call()
        return {name: Timing(3.0 + place, 0.5, 9.0, rounds) for place, name in enumerate(calls)}

    monkeypatch.setattr(recurrent, "in_turns", timed)
    monkeypatch.setitem(recurrent.SHAPES, "rows", (3, 4, 2, 5))
    lstm, gru, input_alone = recurrent._measure("rows", 2)
    assert lstm["case"] == "rows, LSTM, T, N, F, H = 3, 4, 2, 5"
    assert lstm["ratio"] == {"BatchNormLSTM": 0.75, "torch.nn.LSTM": 1.0, "loop over cells": 1.25}
    assert gru["ratio"]["torch.nn.GRU"] == 1.0
    assert input_alone["ratio"] == {"step by step": 1.0, "one call": 1.333}


def test_the_loop_over_cells_computes_what_the_layer_does():
    layer = recurrent.BatchNormGRU(2, 5, 3)
    cell = recurrent.BatchNormGRUCell(2, 5, 3)
    cell.load_state_dict({name.replace("_l0", ""): value for name, value in layer.state_dict().items()})
    x = torch.randn(3, 4, 2)
    torch.testing.assert_close(recurrent._Loop(cell)(x)[0], layer(x)[0])


def test_both_ways_to_normalize_the_input_give_one_gradient(monkeypatch):
    made = []
    monkeypatch.setattr(
        torch, "randn", lambda *shape, _of=torch.randn, **k: made.append(_of(*shape, **k)) or made[-1]
    )
    one_by_one, together = recurrent._input_calls(3, 4, 5).values()
    one_by_one()
    first = made[0].grad.clone()
    made[0].grad = None
    together()
    torch.testing.assert_close(made[0].grad, first, rtol=1e-4, atol=1e-6)


def test_the_command_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "r.json"
    assert main(["bench", "recurrent", "--cases", "rows", "--rounds", "2", "--out", str(out)]) == 0
    (occasion,) = json.loads(out.read_text())["occasions"]
    assert occasion["settings"] == {"threads": 1, "rounds": 2}
    assert len(occasion["results"]) == 3
    for row in occasion["results"]:
        assert all(low <= median <= high for median, low, high in row["seconds"].values())
    assert "loop over cells" in capsys.readouterr().out
    assert bench.TABLES["recurrent"](occasion["results"])[0].row_count == 3
