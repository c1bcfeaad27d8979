import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from image_sets import picture, write_folder

from batchnorm.data import pack as pack_module
from batchnorm.data import pack_shard
from batchnorm.data.folders import open_images
from batchnorm.data.pack import pack
from batchnorm.data.pack_shard import write_shard


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(
        tmp_path_factory.mktemp("source"), {"ape": 9, "bee": 8, "cat": 6}, {"ape": 3, "bee": 4}
    )


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What an undisturbed packing makes, as bytes by name."""
    out = tmp_path_factory.mktemp("whole") / "shards"
    pack(source, out, per_shard=5, progress=False)
    return tars(out)


def tars(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def members(path):
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_report_manifest_and_files_agree(source, tmp_path):
    out = tmp_path / "a" / "shards"
    packed = pack(source, out, per_shard=5, progress=False)
    assert packed.classes == ("ape", "bee", "cat")
    assert (packed.train.num_images, packed.val.num_images) == (23, 7)
    assert [path.name for path in packed.train.shards] == [f"train-00000{n}.tar" for n in range(5)]
    assert [path.name for path in packed.val.shards] == ["val-000000.tar", "val-000001.tar"]
    assert packed.train.num_kept == packed.val.num_kept == 0
    assert packed.train.skipped == packed.val.skipped == ()

    assert json.loads((out / "classes.json").read_bytes()) == ["ape", "bee", "cat"]
    manifest = json.loads((out / "shards.json").read_bytes())
    assert manifest["finished"] is True
    assert manifest["classes"] == ["ape", "bee", "cat"]
    for part in ("train", "val"):
        described = getattr(packed, part)
        assert manifest[part]["images"] == described.num_images
        assert described.num_bytes == sum(path.stat().st_size for path in described.shards)
        for shard, path in zip(manifest[part]["shards"], described.shards, strict=True):
            data = path.read_bytes()
            assert shard["name"] == path.name
            assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            assert shard["images"] == len(members(path)) // 2
    names = {path.name for path in out.iterdir()}
    shards = {path.name for path in (*packed.train.shards, *packed.val.shards)}
    assert names == {
        "classes.json",
        "shards.json",
        "shards.lock",
        *shards,
        *(f"{n}.index.json" for n in shards),
    }


def test_equal_sources_make_equal_shards_and_another_seed_others(source, whole, tmp_path):
    shutil.copytree(source, tmp_path / "copy")
    pack(tmp_path / "copy", tmp_path / "same", per_shard=5, progress=False)
    assert tars(tmp_path / "same") == whole
    pack(source, tmp_path / "other", per_shard=5, seed=1, progress=False)
    assert tars(tmp_path / "other").keys() == whole.keys()
    assert tars(tmp_path / "other")["train-000000.tar"] != whole["train-000000.tar"]


def test_limit_on_bytes(source, tmp_path):
    limit = 20_000
    packed = pack(source, tmp_path / "out", shard_bytes=limit, progress=False)
    found = open_images(tmp_path / "out")
    assert sorted(found.train.labels.tolist()) == [0] * 9 + [1] * 8 + [2] * 6
    assert len(packed.train.shards) > 2
    for path in packed.train.shards:
        # Tar files end in zeros up to a multiple of 10240 bytes, which hold nothing.
        assert len(path.read_bytes().rstrip(b"\0")) + 1024 <= limit
    assert np.diff(found.train.shards).max() > 1
    # A limit that no image keeps gives every image its own shard.
    assert len(pack(source, tmp_path / "tiny", shard_bytes=1, progress=False).train.shards) == 23


def test_awkward_names_become_keys_of_their_own(tmp_path):
    source = write_folder(tmp_path / "set", {"ape": 1}, {"ape": 1})
    ape = source / "train" / "ape"
    for name in ("a.b.c.jpg", "a.png", "a.jpeg", "ä ö.jpg", "x" * 200 + ".jpg", "A.JPEG"):
        suffix = name.rpartition(".")[2].lower()
        (ape / name).write_bytes(picture(len(name), format={"png": "PNG"}.get(suffix, "JPEG")))
    packed = pack(source, tmp_path / "out", progress=False)
    names = members(packed.train.shards[0])
    keys = {name.partition(".")[0] for name in names}
    assert len(keys) == 7
    assert all(name.isascii() and len(name) < 100 and name.count(".") == 1 for name in names)
    assert {name.rpartition(".")[2] for name in names} == {"jpg", "png", "cls"}
    assert any("-ape_a_b_c.jpg" in name for name in names)
    folder, found = open_images(source).train, open_images(tmp_path / "out").train
    assert [found.read(n) for n in range(7)] == [folder.read(n) for n in range(7)]


def test_full_disk_says_so_leaves_no_part_and_goes_on_later(source, whole, tmp_path, monkeypatch):
    out, added, real = tmp_path / "out", [], tarfile.TarFile.addfile

    def addfile(self, member, data):
        added.append(member.name)
        if len(added) == 25:
            self.fileobj.write(b"half of a header")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, member, data)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", addfile)
        says = (
            r"No space left on device while writing .*train-000002\.tar\. 2 shards before it are kept: free"
        )
        with pytest.raises(OSError, match=says) as caught:
            pack(source, out, per_shard=5, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert "checkpoint" not in str(caught.value)
    assert sorted(tars(out)) == ["train-000000.tar", "train-000001.tar"]
    assert not list(out.glob(".*"))

    before = {path.name: path.stat() for path in out.glob("*.tar")}
    packed = pack(source, out, per_shard=5, progress=False)
    assert packed.train.num_kept == 2
    assert tars(out) == whole
    assert all((out / name).stat().st_ino == state.st_ino for name, state in before.items())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_disk_that_is_full_at_the_last_moment(source, whole, tmp_path, monkeypatch, call):
    real = getattr(os, call)

    def fails(path, *rest):
        named = os.readlink(f"/proc/self/fd/{path}") if call == "fsync" else str(path)
        if named.endswith(".train-000001.tar.partial"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(OSError, match=r"while writing .*train-000001\.tar\. 1 shards before it"):
            pack(source, tmp_path / "out", per_shard=5, progress=False)
    assert sorted(tars(tmp_path / "out")) == ["train-000000.tar"]
    pack(source, tmp_path / "out", per_shard=5, progress=False)
    assert tars(tmp_path / "out") == whole


KILLED = """
import os, signal, sys
from batchnorm.data import pack as module
real, calls = getattr(os, sys.argv[3]), []
def dies(*arguments):
    calls.append(arguments)
    if len(calls) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
setattr(os, sys.argv[3], dies)
module.pack(sys.argv[1], sys.argv[2], per_shard=5, progress=False)
"""


@pytest.mark.parametrize(
    ("call", "number"),
    [
        pytest.param("fsync", 7, id="shard written"),
        pytest.param("replace", 5, id="shard renamed, index not"),
        pytest.param("replace", 17, id="all but the manifest"),
    ],
)
def test_killed_packing_goes_on_to_the_same_shards(source, whole, tmp_path, call, number):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, source, out, call, str(number)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert json.loads((out / "shards.json").read_bytes())["finished"] is False
    packed = pack(source, out, per_shard=5, progress=False)
    assert packed.train.num_kept > 0
    assert tars(out) == whole
    assert not list(out.glob(".*"))
    assert open_images(out).train.labels.shape == (23,)


def test_same_command_again_writes_no_shard(source, whole, tmp_path, monkeypatch):
    pack(source, tmp_path / "out", per_shard=5, progress=False)
    monkeypatch.setattr(pack_module, "write_shard", lambda *_: pytest.fail("written again"))
    packed = pack(source, tmp_path / "out", per_shard=5, progress=False)
    assert (packed.train.num_kept, packed.val.num_kept) == (5, 2)
    assert tars(tmp_path / "out") == whole


def test_shard_that_was_touched_or_removed_is_packed_again(source, whole, tmp_path):
    out = tmp_path / "out"
    pack(source, out, per_shard=5, progress=False)
    (out / "train-000001.tar").write_bytes(b"something else")
    (out / "val-000000.tar").unlink()
    packed = pack(source, out, per_shard=5, progress=False)
    assert (packed.train.num_kept, packed.val.num_kept) == (4, 1)
    assert tars(out) == whole


def test_disk_that_returns_something_else_is_found_out(source, tmp_path, monkeypatch):
    def writes_badly(path, *rest):
        written = write_shard(path, *rest)
        with open(path, "r+b") as file:
            # Within the first image's data.
            file.seek(700)
            byte = file.read(1)
            file.seek(700)
            file.write(bytes([byte[0] ^ 4]))
        return written

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_shard", writes_badly)
        with pytest.raises(
            OSError, match=r"\.jpg differs from .*/(ape|bee|cat)/00\d\.jpg after writing.*memory"
        ):
            pack(source, tmp_path / "out", per_shard=5, progress=False)
    assert tars(tmp_path / "out") == {}
    assert not list((tmp_path / "out").glob(".*"))


def test_wrong_label_is_found_out_too(source, tmp_path, monkeypatch):
    real = pack_shard._add
    monkeypatch.setattr(
        pack_shard, "_add", lambda tar, name, data: real(tar, name, b"7" if name.endswith("cls") else data)
    )
    with pytest.raises(OSError, match=r"differs from .* after writing"):
        pack(source, tmp_path / "out", per_shard=5, progress=False)


def spoilt(tmp_path, contents):
    """200 pictures, of which the first are replaced."""
    source = write_folder(tmp_path / "set", {"ape": 100, "bee": 100}, {"ape": 1, "bee": 1})
    paths = sorted((source / "train" / "ape").iterdir())[: len(contents)]
    for path, content in zip(paths, contents, strict=True):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        else:
            path.symlink_to("nowhere")
    return source, [str(path) for path in paths]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "an empty file", id="empty"),
        pytest.param(b"<html>404</html>", "begins with b'<html>404", id="no image"),
        pytest.param(picture(1)[:20], "header|begins with", id="cut in its header"),
    ],
)
def test_bad_image_is_left_out_and_named(tmp_path, content, says):
    source, (path,) = spoilt(tmp_path, [content])
    packed = pack(source, tmp_path / "out", per_shard=30, progress=False)
    assert packed.train.num_images == 199
    assert len(packed.train.skipped) == 1
    assert packed.train.skipped[0].startswith(f"{path}: ")
    assert any(part in packed.train.skipped[0] for part in says.split("|"))
    found = open_images(tmp_path / "out").train
    assert len(found) == 199
    assert np.bincount(found.labels).tolist() == [99, 100]
    manifest = json.loads((tmp_path / "out" / "shards.json").read_bytes())
    assert manifest["train"]["skipped"] == list(packed.train.skipped)
    # Kept shards tell it again.
    again = pack(source, tmp_path / "out", per_shard=30, progress=False)
    assert again.train.num_kept == 7
    assert again.train.skipped == packed.train.skipped


def test_more_than_one_in_a_hundred_stops_with_the_list(tmp_path):
    source, paths = spoilt(tmp_path, [b"", b"x", b"<html>"])
    with pytest.raises(
        ValueError, match=r"3 of the 200 images in .*train cannot be used, more than 1%"
    ) as caught:
        pack(source, tmp_path / "out", per_shard=30, progress=False)
    assert all(f"  {path}: " in str(caught.value) for path in paths)
    assert not list((tmp_path / "out").glob(".*"))


def test_truncated_picture_opens_and_is_packed_as_it_is(tmp_path):
    """Its header is whole; training will skip it, and its name is then that of its source."""
    source, _ = spoilt(tmp_path, [picture(1)[:-100]])
    packed = pack(source, tmp_path / "out", progress=False)
    assert packed.train.num_images == 200


def test_link_to_nowhere(tmp_path):
    source, (path,) = spoilt(tmp_path, [None])
    packed = pack(source, tmp_path / "out", progress=False)
    assert packed.train.skipped == (f"{path}: cannot be read (No such file or directory)",)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param({"per_shard": 6}, r"per_shard \(6 now, 5 there\)", id="another size"),
        pytest.param({"seed": 1}, r"seed \(1 now, 0 there\)", id="another seed"),
        pytest.param({"shard_bytes": 9}, r"shard_bytes \(9 now, None there\)", id="bytes instead"),
    ],
)
def test_shards_of_another_packing_are_not_touched(source, whole, tmp_path, arguments, says):
    pack(source, tmp_path / "out", per_shard=5, progress=False)
    with pytest.raises(ValueError, match=f"another packing, which differs in .*{says}.*give another folder"):
        pack(source, tmp_path / "out", **{"per_shard": 5, "progress": False, **arguments})
    assert tars(tmp_path / "out") == whole


def test_source_that_changed_meanwhile(tmp_path):
    source = write_folder(tmp_path / "set", {"ape": 3})
    pack(source, tmp_path / "out", progress=False)
    (source / "train" / "ape" / "000.jpg").write_bytes(picture(0, width=200))
    with pytest.raises(ValueError, match="differs in names or sizes of the images"):
        pack(source, tmp_path / "out", progress=False)
    (source / "train" / "ape" / "new.jpg").write_bytes(picture(9))
    with pytest.raises(ValueError, match=r"differs in num_train \(4 now, 3 there\): delete"):
        pack(source, tmp_path / "out", progress=False)


def test_folder_that_holds_something_else_is_not_touched(source, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds letters\.txt but no shards\.json"):
        pack(source, tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"letters.txt", "shards.lock"}


def test_damaged_manifest(source, tmp_path):
    (tmp_path / "shards.json").write_text("{")
    with pytest.raises(ValueError, match=r"shards\.json is damaged"):
        pack(source, tmp_path, progress=False)


def test_one_packs_at_a_time(source, tmp_path):
    with open(tmp_path / "shards.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="Another process packs into"):
            pack(source, tmp_path, progress=False)
    assert pack(source, tmp_path, progress=False).train.num_images == 23


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"source": Path("nowhere")}, FileNotFoundError, "nowhere is not a folder"),
        ({"per_shard": 0}, ValueError, "per_shard must be at least 1"),
        ({"shard_bytes": 0}, ValueError, "shard_bytes must be at least 1"),
        ({"seed": -1}, ValueError, "seed must not be negative"),
    ],
    ids=["no source", "no images", "no bytes", "negative seed"],
)
def test_impossible_arguments(source, tmp_path, arguments, error, says):
    with pytest.raises(error, match=says):
        pack(**{"source": source, "out": tmp_path / "out", "progress": False, **arguments})
    assert not (tmp_path / "out").exists()
