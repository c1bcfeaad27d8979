"""Benchmarks: the right shapes, fair turns, no speed-up of wrong numbers, results that accumulate."""

import json
import os

import pytest
import torch
from torch import nn

from batchnorm.bench import kernels, step
from batchnorm.bench.results import append, groups, occasions
from batchnorm.bench.shapes import Shape, inception_shapes, resnet50_shapes
from batchnorm.bench.timing import MEMORY, Timing, copy_time, environment, in_turns, process
from batchnorm.cli import bench, main


def test_inception_has_69_normalizations_of_the_papers_sizes():
    shapes = {shape.size: shape.count for shape in inception_shapes(8)}
    assert sum(shapes.values()) == 69
    assert shapes[64, 112, 112] == 1
    assert shapes[192, 56, 56] == 1
    assert shapes[352, 7, 7] == 2
    assert inception_shapes(8)[0].full == (8, 64, 112, 112)


def test_resnet50_has_53_normalizations():
    shapes = {shape.size: shape.count for shape in resnet50_shapes(32)}
    assert sum(shapes.values()) == 53
    # Stage 2 by hand: conv1 of the first block at 56, 7 at 28; four expansions and a projection.
    assert (shapes[128, 56, 56], shapes[128, 28, 28], shapes[512, 28, 28]) == (1, 7, 5)
    assert shapes[64, 56, 56] == 6
    assert shapes[2048, 7, 7] == 4


def test_every_contender_takes_every_turn_and_the_order_rotates():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = in_turns(calls, rounds=3, slice_s=0.0)
    assert order[-9:] == list("abcbcacab")
    assert all(timing.rounds == 3 for timing in timings.values())


def test_timing_is_median_and_quartiles():
    assert Timing.of([1.0, 9.0, 2.0, 3.0, 4.0]) == Timing(3.0, 1.5, 6.5, 5)


def test_a_copy_copies():
    reused = copy_time((3, 4), torch.float32, fresh=False)
    assert reused() is reused()
    fresh = copy_time((3, 4), torch.float32, fresh=True)
    torch.testing.assert_close(fresh(), fresh(), rtol=0, atol=0)


def test_environment_is_put_back():
    with environment(BATCHNORM_TEST_ONLY="1"):
        assert os.environ["BATCHNORM_TEST_ONLY"] == "1"
    assert "BATCHNORM_TEST_ONLY" not in os.environ


CASE = kernels.Case(Shape("test", (3, 5, 4), 6), "float32", "channels_last", "residual")


def test_a_case_is_timed_against_its_rivals():
    row = kernels.measure(CASE, rounds=2, compiled=False)
    assert row["right"]
    assert set(row["speed_up"]) == {"eager, in place", "eager, as written"}
    ours, eager = (row["ms"][name][0] for name in ("batchnorm", "eager, in place"))
    assert row["speed_up"]["eager, in place"] == pytest.approx(eager / ours, rel=0.02)
    assert 0 < row["floor_share"]["reused"] < 1


class WrongVariance(nn.BatchNorm2d):
    """Off by a thousandth: what nobody sees in a loss curve."""

    def __init__(self, num_features, activation):
        super().__init__(num_features, eps=2e-3)

    def forward(self, x, residual):
        return torch.relu(super().forward(x) + residual)


def test_no_speed_up_of_wrong_numbers(monkeypatch):
    monkeypatch.setattr(kernels, "BatchNorm2d", WrongVariance)
    row = kernels.measure(CASE, rounds=2, compiled=False)
    assert not row["right"]
    assert row["speed_up"] == {}
    assert groups([row]) == {
        "test, float32, channels_last, residual": {
            "cases": 1,
            "wrong": 1,
            "speed_up": {},
            "smallest": {},
            "floor_share": pytest.approx(row["floor_share"], rel=0.01, abs=0.001),
        }
    }


FLOORS = ("fresh", "reused", "kernel, reused")


def test_groups_are_geometric_means_weighted_by_count():
    common = {"network": "n", "dtype": "d", "layout": "l", "fusion": "f", "right": True}
    rows = [
        {**common, "count": count, "speed_up": {"eager": ratio}, "floor_share": dict.fromkeys(FLOORS, share)}
        for count, ratio, share in ((3, 2.0, 0.5), (1, 32.0, 0.125))
    ]
    (group,) = groups(rows).values()
    assert group["speed_up"] == {"eager": 4.0}  # the fourth root of 2·2·2·32
    assert group["smallest"] == {"eager": 2.0}
    assert group["floor_share"]["reused"] == pytest.approx(0.354)


def test_results_of_each_occasion_are_kept(tmp_path):
    path = tmp_path / "r" / "kernels.json"
    for setting in ("default", "kept"):
        append(path, "kernels", [1], memory=setting)
    assert [o["settings"]["memory"] for o in occasions(path)] == ["default", "kept"]
    assert occasions(path)[0]["machine"]["torch"].startswith("2.")
    path.write_text("{")
    with pytest.raises(ValueError, match="no file of benchmark results"):
        append(path, "kernels", [1])


def test_the_command_measures_and_writes(tmp_path, capsys, monkeypatch):
    out = tmp_path / "k.json"
    flags = "kernels --networks small --dtypes float32 --layouts contiguous --fusions relu --rounds 2"
    status = main(["bench", *flags.split(), "--no-compiled", "--memory", "kept", "--out", str(out)])
    assert status == 0
    (occasion,) = json.loads(out.read_text())["occasions"]
    assert len(occasion["results"]) == 9
    assert (tmp_path / "k-kept.png").read_bytes().startswith(b"\x89PNG")
    assert all(row["right"] for row in occasion["results"])
    assert "BN kernels, memory kept" in capsys.readouterr().out


def test_a_file_of_something_else_is_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    out = tmp_path / "k.json"
    out.write_text("[]")
    monkeypatch.setitem(bench.MEASURES, "step", lambda *_: pytest.fail("measured"))
    assert main(["bench", "step", "--out", str(out)]) == 2
    assert "no file of benchmark results" in capsys.readouterr().err
    assert out.read_text() == "[]"


def test_a_process_of_each_setting_has_it():
    for setting in MEMORY:
        with process(setting, threads=1) as fresh:
            assert fresh.submit(os.getenv, "THP_MEM_ALLOC_ENABLE").result() == str(
                int(setting == "huge-pages")
            )
            assert fresh.submit(torch.get_num_threads).result() == 1
            faults = fresh.submit(_faults_of_large_tensors).result()
            # 64 MiB are 16,384 pages, or 32 huge ones.
            assert {"default": faults > 100_000, "huge-pages": True, "kept": faults < 2_000}[setting]


def _faults_of_large_tensors() -> int:
    """Fresh pages met by ten tensors of 64 MiB, after two that do not count."""
    import resource

    for _ in range(2):
        torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_step_of_each_form_in_each_setting():
    found = step.measure(network="cifar10", batch=2, rounds=2, memory=("default", "kept"), threads=1)
    assert set(found["seconds"]) == {"default", "kept"}
    assert len(found["seconds"]["kept"]) == 8
    ratios = found["ratios"]["memory kept"]
    seconds = {form: times[0] for form, times in found["seconds"]["kept"].items()}
    assert ratios["eager as written"] == pytest.approx(seconds["eager"] / seconds["batchnorm"], rel=0.05)
    assert {"memory default", "memory kept"} < set(found["ratios"])


def test_tables_show_every_form():
    seconds = {"kept": {"eager": [1.5, 1.4, 1.6], "batchnorm": [1.0, 0.9, 1.1]}}
    ratios = {"memory kept": {"eager": 1.5}}
    times, ratios = bench.TABLES["step"]({"network": "n", "seconds": seconds, "ratios": ratios})
    assert times.row_count == 2
    assert ratios.row_count == 2
    figures = {"held": 2**30, "peak": 2**31}
    relative = {"held": 1.0, "peak": 1.0}
    (table,) = bench.TABLES["memory"](
        {"network": "n", "bytes": {"eager": figures}, "of_eager_in_place": {"eager": relative}}
    )
    assert table.row_count == 1


def test_a_small_share_does_not_become_none():
    assert kernels.significant(0.000123456) == 0.0001235
    assert kernels.significant(2.34567) == 2.346
