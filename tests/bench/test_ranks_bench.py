"""Steps of several processes: counted and predicted from samples made up by hand, and one tiny real run."""

import json

import pytest
import torch.distributed as dist

from batchnorm.bench import ranks
from batchnorm.bench.ranks import APART, LOCAL, PAIRS, PASSES, SYNCED, TORCH
from batchnorm.bench.scaling import Line, Measured, Work
from batchnorm.cli import bench, main

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo")

WORK = Work("two layers", num_parameters=6, channels=(1, 3), num_elements=0)


def test_links_are_lines_through_small_and_large():
    small, large = 8 * ranks._SMALL, 8 * ranks._LARGE
    # 1 s and 100 bytes a second; of four ranks three are received, and six quarters sent twice around.
    gather = {4: [1 + 3 * small / 100, 1 + 3 * large / 100]}
    reduce = {4: [2 + 1.5 * small / 50, 2 + 1.5 * large / 50]}
    found = ranks._fit([{"gather": gather, "reduce": reduce}] * 3)
    assert found.gather[4] == pytest.approx((1, 100))
    assert found.reduce[4] == pytest.approx((2, 50))
    assert ranks._fit([{"gather": {}, "reduce": {}}]) == Measured({}, {})


def test_a_row_predicts_from_one_process_and_compares_within_rounds():
    one = {APART: [1.0, 1.0], LOCAL: [2.0, 2.0], SYNCED: [2.0, 2.0], TORCH: [2.0, 2.0], PASSES: [2.5, 2.5]}
    # A machine that is twice as slow in the second round is so for all of them.
    four = {APART: [3.0, 3.0], LOCAL: [4.0, 8.0], SYNCED: [6.0, 12.0], PAIRS: [5.0, 10.0], TORCH: [4.0, 8.0]}
    lines = {2: Line(1.0, 8.0), 4: Line(2.0, 8.0)}
    row = ranks._row(WORK, {1: one, 4: four}, 4, Measured(lines, lines), {}, 2.0)
    assert row["stretch"] == {"computed": 2.0, "measured": 3.0}
    assert row["overhead"] == {SYNCED: [0.5] * 3, PAIRS: [0.25] * 3, TORCH: [0.0] * 3}
    gradient = 2 + 1.5 * 24 / 8
    whole = 2 * 2 + 3 * (3 + 7) + 2 * 2 + 1.5 * (2 + 6)
    pairs = 2 * 1 + (3 + 7) + 2 * 1 + (2 + 6)
    assert row["predicted"] == {
        LOCAL: [4 + gradient, 6 + gradient],
        PAIRS: [5 + gradient + pairs, 7.5 + gradient + pairs],
        SYNCED: [5 + gradient + whole, 7.5 + gradient + whole],
    }
    assert row["collectives"]["computed"] == {"all_gather": [2, 80], "all_reduce": [2, 64]}


@gloo
def test_the_command_runs_two_processes_counts_and_writes(tmp_path, capsys):
    out = tmp_path / "r.json"
    flags = "ranks --networks resnet --ranks 1 2 --rounds 2 --steps 1"
    assert main(["bench", *flags.split(), "--out", str(out)]) == 0
    (occasion,) = json.loads(out.read_text())["occasions"]
    assert occasion["settings"] == {"threads": 1, "rounds": 2, "steps": 1}
    (found,) = occasion["results"]
    assert found["layers"] == 9
    assert "SyncBatchNorm expected input tensor to be on GPU" in found["torch.nn.SyncBatchNorm"]
    one, two = found["ranks"]
    assert set(one["seconds"]) == {APART, LOCAL, SYNCED, TORCH, PASSES}
    assert set(two["seconds"]) == {APART, LOCAL, SYNCED, TORCH}
    assert one["collectives"]["measured"] == {"all_gather": [0, 0], "all_reduce": [0, 0]}
    # 3 layers of 16 channels, 3 of 32 and 3 of 64: mean, variance and count of each, in 8 bytes.
    num_channels = 3 * (16 + 32 + 64)
    expected = {"all_gather": [9, 8 * (2 * num_channels + 9)], "all_reduce": [9, 8 * 2 * num_channels]}
    assert two["collectives"] == {"measured": expected, "computed": expected}
    assert all(latency >= 0 and rate > 0 for of in two["links"].values() for latency, rate in of.values())
    assert two["predicted"][SYNCED][0] > two["predicted"][LOCAL][0] > one["predicted"][LOCAL][0]
    printed = capsys.readouterr().out
    assert "9 all_gather" in printed
    assert "SyncBatchNorm expected" in " ".join(printed.split())


def test_one_process_is_where_the_model_starts(capsys):
    assert main(["bench", "ranks", "--ranks", "2", "4"]) == 2
    assert "ranks must hold 1" in capsys.readouterr().err


def test_the_models_table_measures_nothing(capsys):
    assert main(["bench", "scaling", "--network", "resnet50", "--gpu", "p100"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "ResNet-50, 32 images a GPU" in printed
    assert "1,024" in printed
    assert "no GPU has confirmed" in printed


def test_the_table_shows_every_form_and_the_links():
    seconds = {LOCAL: [1.0, 0.9, 1.1], SYNCED: [2.0, 1.9, 2.1]}
    row = {
        "ranks": 2,
        "seconds": seconds,
        "predicted": {LOCAL: [1.0, 1.2]},
        "overhead": {SYNCED: [1.0, 0.9, 1.1]},
        "links": {"all_gather": {"2": [1e-4, 1e9]}},
        "collectives": {"measured": {"all_gather": [1, 8]}, "computed": {"all_gather": [1, 16]}},
    }
    network = {"network": "n", "layers": 1, "cores": 2, "torch.nn.SyncBatchNorm": "", "ranks": [row]}
    times, links = bench.TABLES["ranks"]([network])
    assert times.row_count == 2
    assert list(links.columns[4].cells) == ["[1, 16]"]
