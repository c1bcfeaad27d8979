import errno
import os

import pytest

from batchnorm import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 0.1})
    files.write_json(path, {"b": [1, None]})
    assert path.read_text() == '{\n  "b": [\n    1,\n    null\n  ]\n}\n'
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path, monkeypatch, call):
    path = tmp_path / "a"
    files.write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(OSError, match=r"No space left.*free some space") as caught:
            files.write_bytes(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_other_errors_come_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        files.write_bytes(tmp_path / "absent" / "a", b"")


def test_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "step-3"
    files.write_folder(path, {"a": b"1", "b": b"2"})
    files.write_folder(path, {"a": b"3"})
    assert names(tmp_path) == ["step-3"]
    assert names(path) == ["a"]
    assert (path / "a").read_bytes() == b"3"


def test_full_disk_in_the_middle_of_a_folder_leaves_nothing_of_it(tmp_path, monkeypatch):
    files.write_folder(tmp_path / "step-1", {"a": b"1"})
    real, calls = os.fsync, []

    def second_fails(descriptor):
        calls.append(descriptor)
        real(descriptor) if len(calls) == 1 else full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", second_fails)
        with pytest.raises(OSError, match="step-2"):
            files.write_folder(tmp_path / "step-2", {"a": b"1", "b": b"2"})
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "step-1" / "a").read_bytes() == b"1"


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """Files first, then the folder's names, then the rename, then the parent's names."""
    events, real_fsync, real_rename = [], os.fsync, os.rename

    def fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(source, target, **_):
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    files.write_folder(tmp_path / "step-1", {"a": b"1", "b": b"2"})
    assert events == ["a", "b", ".step-1.partial", "rename", tmp_path.name]


def test_lines_are_appended(tmp_path):
    path = tmp_path / "log"
    files.append_line(path, "one")
    files.append_line(path, "two")
    files.sync_file(path)
    assert path.read_text() == "one\ntwo\n"


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".step-1.partial").mkdir()
    (tmp_path / ".step-1.partial" / "a").write_bytes(b"")
    (tmp_path / ".x.json.partial").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"")
    (tmp_path / "my.partial").write_bytes(b"")
    files.remove_partial(tmp_path)
    assert names(tmp_path) == [".hidden", "my.partial"]


def test_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a", {"loss": float("nan")})
    assert names(tmp_path) == []
