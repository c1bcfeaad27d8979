"""What watching costs: fair turns, whole periods, every network."""

import json

import pytest

from batchnorm.bench import watch
from batchnorm.bench.networks import NETWORKS
from batchnorm.cli import bench, main


class Clock:
    """Time that passes only when a step takes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, []
        for name in ("perf_counter", "process_time"):
            monkeypatch.setattr(watch.time, name, lambda: self.now)

    def step(self, name: str, *seconds: float) -> object:
        taken = iter(seconds)

        def step() -> None:
            self.order.append(name)
            self.now += next(taken)

        return step


def test_a_period_counts_the_record_the_step_after_and_all_others(monkeypatch):
    clock = Clock(monkeypatch)
    plain = clock.step("plain", *[2.0] * 5)
    watched = clock.step("watched", 7.0, 3.0, 2.1, 2.1, 2.1)
    found = watch._period(plain, watched, 5)
    assert found == pytest.approx(
        {"step_s": 2.0, "added": 0.63, "added_cpu": 0.63, "between": 0.05, "record": 3.0}
    )
    assert clock.order[:4] == ["watched", "plain", "plain", "watched"]  # neither is always first


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_have_normalizations_and_can_be_trained(network):
    found = watch._measure(network, 2, 0.0)
    assert found["layers"] == {"mlp": 3, "cifar10": 69, "resnet": 9}[network]
    assert found["periods"] == 3
    assert all(len(found[part]) == 3 for part in ("step_s", "added", "added_cpu", "between", "record"))
    assert found["step_s"][1] <= found["step_s"][0] <= found["step_s"][2]


def test_the_command_measures_and_writes(tmp_path, capsys):
    out = tmp_path / "w.json"
    assert (
        main(["bench", "watch", "--networks", "mlp", "--every", "3", "--seconds", "0", "--out", str(out)])
        == 0
    )
    (occasion,) = json.loads(out.read_text())["occasions"]
    assert occasion["settings"] == {"threads": 1, "every": 3, "seconds": 0.0}
    assert occasion["results"][0]["network"].startswith("784-100-100-100-10")
    assert "Watching" in capsys.readouterr().out
    (table,) = bench.TABLES["watch"](occasion["results"] * 2)
    assert table.row_count == 2
