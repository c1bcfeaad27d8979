import os
import re

import pytest
from image_sets import write_folder

from batchnorm.cli import main
from batchnorm.data import pack as pack_module
from batchnorm.data.folders import open_images


@pytest.fixture
def source(tmp_path):
    return write_folder(tmp_path / "photos", {"ape": 130, "bee": 70}, {"ape": 2, "bee": 1})


def test_packs_says_what_lies_where_and_goes_on(source, tmp_path, capsys):
    out = tmp_path / "shards"
    assert main(["shards", str(source), str(out), "--per-shard", "60"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert f"{out}: 2 classes\n" in said.out
    assert re.search(r"  train: 200 images in 4 shards, 0\.\d MB\n  val: 3 images in 1 shards, ", said.out)
    assert f"Use them as --data {out}\n" in said.out
    assert len(open_images(out).train) == 200

    (out / "train-000002.tar").unlink()
    assert main(["shards", str(source), str(out), "--per-shard", "60"]) == 0
    assert "200 images in 4 shards (3 from before)" in capsys.readouterr().out


def test_flags_reach_the_packing(source, tmp_path, monkeypatch, capsys):
    told = {}

    def pack(source, out, **flags):
        told.update(flags, source=source, out=out)
        raise ValueError("enough")

    monkeypatch.setattr("batchnorm.cli.shards.pack", pack)
    arguments = ["shards", "a", "b", "--shard-bytes", "1000", "--seed", "4", "--no-progress"]
    assert main(arguments) == 2
    assert (str(told.pop("source")), str(told.pop("out"))) == ("a", "b")
    assert told == {"per_shard": 1000, "shard_bytes": 1000, "seed": 4, "progress": False}


def test_left_out_images_are_listed(source, tmp_path, capsys):
    bad = source / "train" / "ape" / "007.jpg"
    bad.write_bytes(b"")
    assert main(["shards", str(source), str(tmp_path / "shards")]) == 0
    assert f"1 left out:\n  {bad}: an empty file" in capsys.readouterr().out


def test_errors_are_one_message(source, tmp_path, capsys):
    (source / "val" / "cow").mkdir()
    assert main(["shards", str(source), str(tmp_path / "shards")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("batchnorm: error: ")
    assert "val has cow, which is no class" in said
    assert "Traceback" not in said


def test_ctrl_c_leaves_finished_shards(source, tmp_path, monkeypatch, capsys):
    real = pack_module.write_shard

    def interrupted(path, *rest):
        if "train-000002" in path.name:
            raise KeyboardInterrupt
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "write_shard", interrupted)
        assert main(["shards", str(source), str(tmp_path / "shards"), "--per-shard", "60"]) == 130
    assert capsys.readouterr().err == (
        "batchnorm: stopped; finished shards are kept, and the same command goes on\n"
    )
    assert sorted(path.name for path in (tmp_path / "shards").glob("*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
    ]
    assert main(["shards", str(source), str(tmp_path / "shards"), "--per-shard", "60"]) == 0
    assert "(2 from before)" in capsys.readouterr().out


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setitem(os.environ, "COLUMNS", "120")
    with pytest.raises(SystemExit, match="0"):
        main(["shards", "--help"])
    shown = capsys.readouterr().out
    assert "batchnorm shards photos shards" in shown
    for flag in ("FOLDER", "OUT", "--per-shard", "--shard-bytes", "--seed", "--no-progress"):
        assert flag in shown
    assert "train/CLASS/NAME.jpg" in shown


def test_missing_argument(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["shards", "photos"])
