import errno
import json
import re
import struct

import pytest

from batchnorm.train.metrics import MetricsLog, ProgressReport, cut_metrics, read_metrics


def line(step, **values):
    return json.dumps({"step": step, **values}) + "\n"


def test_rows_after_the_step_are_cut_and_the_others_keep_every_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 0.1 * step / 3} for step in (5, 10, 15)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cut_metrics(path, 10)
    assert read_metrics(path) == rows[:2]
    cut_metrics(path, 0)
    assert path.read_bytes() == b""


def test_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(5, loss=1.0) + line(10, loss=0.5)[:-3])
    assert [row["step"] for row in read_metrics(path)] == [5]
    cut_metrics(path, 10)
    assert path.read_text() == line(5, loss=1.0)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(line(5) + "{nonsense}\n" + line(15), id="no JSON"),
        pytest.param(line(5) + "[1]\n" + line(15), id="no object"),
        pytest.param(line(5) + '{"loss": 1}\n' + line(15), id="no step"),
        pytest.param(line(5) + line(5), id="a step twice"),
        pytest.param(line(5) + line(4), id="a step back"),
    ],
)
def test_damage_in_the_middle_is_named_and_not_repaired(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is damaged"):
        cut_metrics(path, 100)
    assert path.read_text() == content


def test_absent_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_log_appends_and_refuses_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(5, loss=1.0))
    log = MetricsLog(path, None, 5)
    log.write({"step": 10, "loss": 0.1 + 0.2})
    with pytest.raises(ValueError, match="JSON"):
        log.write({"step": 15, "loss": float("nan")})
    log.sync()
    log.close()
    assert read_metrics(path) == [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 0.1 + 0.2}]


def read_events(folder):
    """Scalars as TensorBoard shows them, after hiding what a later start purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_each_step_once_after_a_restart(tmp_path):
    folder = tmp_path / "tensorboard"
    for start, value in ((0, 1.0), (10, 2.0)):
        log = MetricsLog(tmp_path / f"{start}.jsonl", folder, start)
        for step in range(start + 5, 31, 5):
            log.write({"step": step, "loss": value})
        log.sync()
        log.close()
    assert read_events(folder) == {"loss": [(5, 1.0), (10, 1.0), (15, 2.0), (20, 2.0), (25, 2.0), (30, 2.0)]}


def test_full_disk_is_explained_for_events_too(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "m.jsonl", tmp_path / "tensorboard", 0)

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(log._writer, "add_scalar", full_disk)
        with pytest.raises(OSError, match=r"while writing .*tensorboard\. Nothing written earlier is lost"):
            log.write({"step": 1, "loss": 1.0})
    log.close()


def test_without_a_terminal_each_evaluation_is_one_line(capsys):
    with ProgressReport(1000, 0) as report:
        report.row({"step": 100, "loss": 1.5})
        report.step(150)
        report.row({"step": 200, "loss": 1.25, "accuracy": 0.875, "test_loss": 0.4})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(
        r"step 200/1000  loss 1\.25  accuracy 87\.50%  \d+ steps/s  \d+:\d\d left\n", captured.err
    )


def test_speed_counts_only_the_steps_of_this_start(capsys, monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr("batchnorm.train.metrics.time.perf_counter", lambda: next(clock))
    with ProgressReport(1000, 400) as report:
        report.row({"step": 500, "accuracy": 0.5})
    # 100 steps in 2 seconds leave 500 steps for 10 seconds.
    assert capsys.readouterr().err == "step 500/1000  accuracy 50.00%  50 steps/s  0:10 left\n"


def test_silence(capsys):
    with ProgressReport(10, 0, shown=False) as report:
        report.step(5)
        report.row({"step": 10, "accuracy": 1.0})
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_loss_accuracy_speed_and_time_left(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's own switch to take any stream for a terminal
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with ProgressReport(1000, 0) as report:
        report.row({"step": 200, "loss": 1.25, "accuracy": 0.875})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert re.search(r"200/1000 loss 1\.25  accuracy 87\.50%  \d+ steps/s  \d+:\d\d left", shown)


def test_event_files_are_in_the_format_of_records_not_pickle(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", tmp_path / "tb", 0)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    (path,) = (tmp_path / "tb").iterdir()
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    assert b"brain.Event" in data[12 : 12 + length]
