"""Code planted in every kind of file that is read does not run; bombs and lies do not work."""

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from importlib import import_module

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import batchnorm
from batchnorm.cli import main
from batchnorm.cli.saved import call, load_weights
from batchnorm.data import fetch as fetch_room
from batchnorm.data import open_images
from batchnorm.data.cifar import unpickle
from batchnorm.data.fetch import fetch
from batchnorm.data.idx import read_idx
from batchnorm.data.shard_index import index_path, load_index, scan_shard
from batchnorm.data.shards import expand, open_shards
from batchnorm.diagnostics.history import load_histories
from batchnorm.reading import read_arrays, read_json, read_limited, read_torch
from batchnorm.reproduce.activations.job import History
from batchnorm.statistics import Domains, Population
from batchnorm.train.checkpoint import load_checkpoint
from batchnorm.train.run import read_run


class Plant:
    """Unpickled, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture
def mark(tmp_path):
    """A path at which a planted program would make a file."""
    return tmp_path / "planted-code-ran"


def pickled(mark):
    return pickle.dumps({"weight": torch.ones(2), "x": Plant(mark)})


def test_the_plant_works_where_pickle_is_trusted(mark):
    pickle.loads(pickled(mark))["x"].close()
    assert mark.exists()


def in_torch_file(mark, *, zipped):
    whole = io.BytesIO()
    torch.save({"weight": torch.ones(2), "x": Plant(mark)}, whole, _use_new_zipfile_serialization=zipped)
    return whole.getvalue()


def in_npz(mark):
    whole = io.BytesIO()
    np.savez(whole, mean=np.array([Plant(mark)], dtype=object))
    return whole.getvalue()


PLANTED = {
    "a bare pickle as .pt": ("w.pt", pickled),
    "torch.save, zip": ("w.pt", lambda mark: in_torch_file(mark, zipped=True)),
    "torch.save, before 1.6": ("w.pth", lambda mark: in_torch_file(mark, zipped=False)),
    "a pickle called safetensors": ("w.safetensors", pickled),
    "a pickle as CIFAR batch": ("data_batch_1", pickled),
    "objects in npz": ("history.npz", in_npz),
    "a pickle called npz": ("history.npz", pickled),
    "a pickle as recipe": ("recipe.json", pickled),
    "a pickle as idx": ("train-images-idx3-ubyte", pickled),
    "a pickle as gzip idx": ("train-images-idx3-ubyte.gz", lambda mark: gzip.compress(pickled(mark))),
    "a pickle as shard": ("train-000000.tar", pickled),
    "a pickle as population": ("p.safetensors", pickled),
}

READ_BY = {
    "w": [lambda path: load_weights(nn.Linear(2, 1), path), read_torch],
    "data_batch_1": [lambda path: unpickle(path.read_bytes())],
    "history": [load_histories, read_arrays, History.read],
    "recipe": [lambda path: read_run(path.parent), read_json],
    "train-images-idx3-ubyte": [read_idx],
    "train-000000": [scan_shard],
    "p": [Population.load, lambda path: Domains.load(nn.BatchNorm1d(1), path)],
}


@pytest.mark.parametrize("kind", PLANTED)
def test_code_planted_in_a_file_is_not_run(tmp_path, mark, kind):
    name, content = PLANTED[kind]
    path = tmp_path / name
    path.write_bytes(content(mark))
    for read in READ_BY[name.partition(".")[0]]:
        with pytest.raises(ValueError, match=r"\w"):
            read(path)
    assert not mark.exists()


@pytest.mark.parametrize("part", ["model.safetensors", "training.safetensors", "state.json"])
def test_code_planted_in_a_checkpoint_is_not_run(tmp_path, mark, part):
    folder = tmp_path / "step-1"
    folder.mkdir()
    content = safetensors.torch.save({"w": torch.ones(1)})
    parts = {"model.safetensors": content, "training.safetensors": content}

    def facts(data):
        return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    if part != "state.json":
        parts[part] = pickled(mark)
    state = {"format": 1, "step": 1, "files": {name: facts(data) for name, data in parts.items()}}
    for name, data in parts.items():
        (folder / name).write_bytes(data)
    (folder / "state.json").write_bytes(pickled(mark) if part == "state.json" else json.dumps(state).encode())
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(folder)
    assert not mark.exists()


def test_the_command_runs_no_code_of_weights_and_overwrites_nothing(tmp_path, mark, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted_models.py").write_text("from torch import nn\ndef net(): return nn.BatchNorm1d(2)\n")
    (tmp_path / "w.pt").write_bytes(in_torch_file(mark, zipped=True))
    (tmp_path / "out.pt").write_bytes(b"older")
    for command in ("fold", "recalibrate", "export"):
        out = "out.pt2" if command == "export" else "out.pt"
        (tmp_path / out).write_bytes(b"older")
        assert main([command, "planted_models:net", "--weights", "w.pt", "--out", out, "--force"]) == 2
        assert "weights_only=True" in capsys.readouterr().err
        assert (tmp_path / out).read_bytes() == b"older"
    assert not mark.exists()


# Only what the user names is imported.


def test_a_factory_is_looked_for_in_the_working_directory_which_does_not_stay_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "user_models_a.py").write_text("import user_parts_a\ndef net(): return user_parts_a.made()\n")
    (tmp_path / "user_parts_a.py").write_text("def made(): return 7\n")
    assert call("user_models_a:net") == 7
    assert sys.path[0] != str(tmp_path)
    assert sys.path[-1] == str(tmp_path)


def test_a_file_named_as_a_package_is_not_imported_in_its_place(tmp_path, mark, monkeypatch):
    here, installed = tmp_path / "here", tmp_path / "installed"
    here.mkdir(), installed.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [str(installed), *sys.path])
    (here / "user_models_b.py").write_text("def net(): return 1\n")
    (here / "imported_later_b.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (installed / "imported_later_b.py").write_text("")
    assert call("user_models_b:net") == 1
    import_module("imported_later_b")
    assert not mark.exists()


@pytest.mark.parametrize("named", ["os;print:x", "../models:net", "models:net()", ":net", "a b:c", "a:"])
def test_what_is_no_name_is_not_imported(named):
    with pytest.raises(ValueError, match="module:function is needed"):
        call(named)


# Bombs.


def zip_with(entries, *, compressed):
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return whole.getvalue()


def test_a_torch_file_that_expands_is_refused_before_it_does(tmp_path):
    path = tmp_path / "w.pt"
    path.write_bytes(zip_with({"archive/data.pkl": bytes(50 << 20)}, compressed=True))
    assert path.stat().st_size < 60_000
    with pytest.raises(ValueError, match=r"is compressed, which torch\.save never writes"):
        load_weights(nn.Linear(2, 1), path)


def test_a_torch_file_whose_parts_overlap_is_refused(tmp_path):
    content = bytearray(zip_with({f"archive/data/{i}": bytes(1000) for i in range(20)}, compressed=False))
    at = content.index(b"PK\1\2")
    while at >= 0:  # every entry of the directory points at the first file, and names it longer
        content[at + 20 : at + 28] = struct.pack("<II", 20_000, 20_000)
        content[at + 42 : at + 46] = bytes(4)
        at = content.find(b"PK\1\2", at + 4)
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bytes expand to 400,000"):
        read_torch(path)


def test_arrays_that_expand_beyond_the_limit_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, mean=np.zeros(1_000_000))
    assert read_arrays(path)["mean"].shape == (1_000_000,)
    with pytest.raises(ValueError, match="would take 8,000,128 bytes, and 1,000,000 are allowed"):
        read_arrays(path, 1_000_000)


def test_an_npz_header_that_promises_terabytes_is_refused(tmp_path):
    whole = io.BytesIO()
    np.lib.format.write_array_header_1_0(whole, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    path = tmp_path / "a.npz"
    path.write_bytes(zip_with({"mean.npy": whole.getvalue() + bytes(64)}, compressed=False))
    with pytest.raises(ValueError, match="a header promises 8,796,093,022,208 bytes, 64 are there"):
        read_arrays(path)


def test_gzip_that_expands_is_read_no_further_than_its_header_says(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 10) + bytes(100 << 20)))
    with pytest.raises(ValueError, match="the end of the file after 10 bytes"):
        read_idx(path)


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_an_idx_header_that_lies_is_refused_before_memory_is_asked_for(tmp_path, zipped):
    path = tmp_path / "images"
    content = struct.pack(">HBBII", 0, 8, 2, 30_000, 30_000) + bytes(100)
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=r"expected 900000000 bytes of data.*holds at most"):
        read_idx(path)
    path.write_bytes(struct.pack(">HBBIII", 0, 8, 3, 1 << 31, 1 << 31, 1 << 31))
    with pytest.raises(ValueError, match="at most 1073741824 bytes"):
        read_idx(path)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b'{"w":{"dtype":"F32","shape":[4000000000000],"data_offsets":[0,4]}}', id="shape"),
        pytest.param(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}', id="offsets"),
        pytest.param(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', id="backwards"),
        pytest.param(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"v":{"dtype":"F32","shape":[1],'
            b'"data_offsets":[0,4]}}',
            id="overlap",
        ),
        pytest.param(b"[" * 200_000, id="nested"),
        pytest.param(b'{"w":{"dtype":"XX","shape":[1],"data_offsets":[0,4]}}', id="dtype"),
    ],
)
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(nn.Linear(1, 1, bias=False), path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + header)
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(nn.Linear(1, 1, bias=False), path)


def test_json_is_bounded_in_size_and_depth(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"[" * 100_000 + b"]" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    path.write_bytes(b"[" + b"1," * 100 + b"1]")
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_json(path, 100)
    assert len(read_limited(path, 203)) == 203
    assert len(read_limited(path, 1 << 60)) == 203  # takes no memory for what is not there
    (tmp_path / "recipe.json").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match=r"recipe\.json cannot be used: it is nested too deeply"):
        read_run(tmp_path)


def test_a_recipe_of_wrong_types_is_refused(tmp_path):
    recipe = batchnorm.train.recipes.bn_mlp().to_json() | {"steps": "many"}
    facts = dict.fromkeys(("name", "image_shape", "num_train", "num_test", "sha256"), 0)
    (tmp_path / "recipe.json").write_text(json.dumps({"format": 1, "recipe": recipe, "data": facts}))
    with pytest.raises(ValueError, match=r"recipe\.json cannot be used"):
        read_run(tmp_path)


def test_a_pickle_that_numbers_beyond_its_size_is_refused_before_the_memo_grows():
    with pytest.raises(ValueError, match=r"numbers an object 4294967295, and has 9 bytes"):
        unpickle(b"\x80\x02]r\xff\xff\xff\xff.")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        pytest.param(np.array([{1: 2}], dtype=object), "dtype 'O8'", id="objects"),
        pytest.param(np.zeros(2, dtype=[("a", "u1"), ("b", "<f4")]), "dtype 'V5'", id="fields"),
        pytest.param(np.array(["2020"], dtype="M8[D]"), "dtype 'M8'", id="dates"),
        pytest.param(np.array(["abc"]), "dtype 'U3'", id="text"),
    ],
)
def test_arrays_of_anything_but_numbers_are_refused(kind, says):
    with pytest.raises(ValueError, match=says):
        unpickle(pickle.dumps(kind, protocol=4))


def test_an_array_whose_shape_is_not_that_of_its_bytes_is_refused():
    content = pickle.dumps(np.arange(6, dtype=np.uint8).reshape(2, 3), protocol=4)
    lying = content.replace(b"K\x02K\x03\x86", b"K\x02K\xff\x86")
    assert lying != content
    with pytest.raises(ValueError, match=r"6 bytes for an array of shape \(2, 255\)"):
        unpickle(lying)


# Tar files write nothing and read nothing outside.


def tar_with(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content, link in members:
            member = tarfile.TarInfo(name)
            if link is not None:
                member.type, member.linkname = link
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_shards_cannot_write_or_read_outside(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    members = [
        ("../../escaped.jpg", b"x", None),
        ("../../escaped.cls", b"0", None),
        (f"{tmp_path}/absolute.jpg", b"y", None),
        (f"{tmp_path}/absolute.cls", b"0", None),
        ("link.jpg", b"", (tarfile.SYMTYPE, str(secret))),
        ("hard.jpg", b"", (tarfile.LNKTYPE, "../secret.jpg")),
        ("device.jpg", b"", (tarfile.CHRTYPE, "")),
    ]
    for part in ("train", "val"):
        tar_with(inside / f"{part}-000000.tar", members)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    images = open_images(inside).train
    assert [images.read(i) for i in range(len(images))] == [b"x", b"y"]  # links are no images
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path.parent / "escaped.jpg").exists()


def test_an_index_that_points_outside_its_shard_is_not_believed(tmp_path):
    shard = tmp_path / "train-000000.tar"
    tar_with(shard, [("a.jpg", b"picture", None), ("a.cls", b"1", None)])
    state = shard.stat()
    lie = {"format": 1, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
    lie |= {"names": ["a.jpg"], "offsets": [512], "sizes": [1 << 60], "labels": [1]}
    index_path(shard).write_text(json.dumps(lie))
    assert load_index(shard).sizes == [7]


def test_a_label_as_long_as_a_film_is_not_read(tmp_path):
    shard = tmp_path / "train-000000.tar"
    tar_with(shard, [("a.jpg", b"picture", None), ("a.cls", b"1" * (2 << 20), None)])
    with pytest.raises(ValueError, match=r"a\.cls should give the label"):
        scan_shard(shard)


def test_a_range_of_shards_without_bound_is_refused():
    with pytest.raises(ValueError, match="more than 1,000,000 shards"):
        expand("train-{0..999999999999}.tar")


@pytest.mark.parametrize("content", [b"[]", b'{"finished": true}', b'{"finished": true, "train": 3}', b"x"])
def test_a_damaged_list_of_shards_is_said_so(tmp_path, content):
    for part in ("train", "val"):
        tar_with(tmp_path / f"{part}-000000.tar", [("a.jpg", b"p", None), ("a.cls", b"0", None)])
    (tmp_path / "shards.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"shards\.json is damaged"):
        open_shards(tmp_path)


# Downloads.


def test_a_download_without_end_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_room, "MAX_BYTES", 1000)
    sent = []

    class Endless:
        def __init__(self, progressbar, **_):
            self.bar = progressbar

        def __call__(self, url, path, _):
            with open(path, "wb") as file:
                for _ in range(100):
                    file.write(bytes(100))
                    sent.append(100)
                    self.bar.update(100)

    monkeypatch.setattr("pooch.HTTPDownloader", Endless)
    with pytest.raises(ValueError, match="more than 1,000 bytes came"):
        fetch("a.gz", ["http://nowhere/"], "0" * 32, tmp_path, progress=False)
    assert sum(sent) <= 1100
    assert os.listdir(tmp_path) == []
