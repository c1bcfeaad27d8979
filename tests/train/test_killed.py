import json
import subprocess
import sys
from pathlib import Path

import pytest

from batchnorm.train.checkpoint import load_checkpoint
from batchnorm.train.metrics import read_metrics


@pytest.mark.slow
def test_killed_at_ten_random_instants_ends_with_the_same_bits(tmp_path):
    program = Path(__file__).with_name("killed_run.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path, "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["status"] == 0, done.stderr
    # The kills fell into the training: attempts went on from checkpoints of earlier ones.
    assert told["num_kills"] == 10
    assert len(set(told["reached"])) >= 4
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    ends = [load_checkpoint(run / "checkpoints" / "step-300") for run in (whole, killed)]
    for part in ("model", "training"):
        first, second = (getattr(end, part) for end in ends)
        assert first.keys() == second.keys()
        assert all(first[name].equal(second[name]) for name in first)

    rows = [read_metrics(run / "metrics.jsonl") for run in (whole, killed)]
    due = [step for step in range(1, 301) if step % 5 == 0 or step % 7 == 0]
    assert [row["step"] for row in rows[1]] == due
    for row in [*rows[0], *rows[1]]:
        assert row.pop("seconds") > 0
    assert rows[0] == rows[1]
    assert not list(killed.rglob("*.partial"))
    assert len(list((killed / "checkpoints").iterdir())) <= 3
