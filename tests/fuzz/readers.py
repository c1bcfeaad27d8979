"""Every reader of files, each with well-formed examples to be damaged, and the errors that it declares."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from batchnorm.bench.results import occasions
from batchnorm.cli.saved import load_weights
from batchnorm.data.cifar import unpickle
from batchnorm.data.crops import Box
from batchnorm.data.decode import BadImage, read_crop
from batchnorm.data.idx import read_idx
from batchnorm.data.shard_index import index_path, load_index, scan_shard
from batchnorm.data.shards import open_shards
from batchnorm.data.usps import read_usps
from batchnorm.diagnostics import history
from batchnorm.diagnostics.history import load_histories
from batchnorm.reading import read_arrays, read_json, read_torch
from batchnorm.reproduce.claiming import claim_folder
from batchnorm.reproduce.training import Course
from batchnorm.statistics import Domains, Population
from batchnorm.train.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from batchnorm.train.metrics import read_metrics
from batchnorm.train.recipes import bn_mlp
from batchnorm.train.run import read_run


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: Of the file that it gets, too, which may tell it the kind.
        read: Reads the file; its result does not matter.
        errors: That it declares. Any other is a crash.
        seeds: Contents that it takes.
    """

    name: str
    read: Callable[[Path], object]
    errors: tuple[type[BaseException], ...]
    seeds: Callable[[], list[bytes]]


def _idx() -> list[bytes]:
    images = struct.pack(">HBBIII", 0, 8, 3, 2, 3, 4) + bytes(range(24))
    floats = struct.pack(">HBBI", 0, 0x0D, 1, 3) + struct.pack(">3f", 1, 2, 3)
    return [images, floats, gzip.compress(images, mtime=0), struct.pack(">HBBI", 0, 8, 1, 0)]


AS_PUBLISHED = (
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05"
    b"U\x01b\x87q\x06Rq\x07(K\x01K\x02K\x06\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87q\tRq\n(K\x03U\x01|NNN"
    b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0bb\x89U\x0cabcdefghijkltq\x0cbU\x06labels]q\r(K\x03K\x01eu."
)
"""A batch of CIFAR-10 in small, in the words of Python 2."""


def _pickles() -> list[bytes]:
    content = {b"data": np.arange(12, dtype=np.int32).reshape(2, 6), b"x": (1.5, None, "é")}
    plain = [pickle.dumps([1, {2: 3}, (4,)], protocol=p) for p in range(5)]
    return [AS_PUBLISHED, pickle.dumps(content, protocol=4), *plain]


def _tars() -> list[bytes]:
    found = []
    for style in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        whole = io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w", format=style) as tar:
            for name, content in (
                ("a.jpg", b"\xff\xd8picture"),
                ("a.cls", b"1"),
                (f"{'long/' * 30}ü.png", b"p"),
                (f"{'long/' * 30}ü.json", b'{"label": 0}'),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        found.append(whole.getvalue())
    return found


def _pictures() -> list[bytes]:
    pixels = np.arange(12 * 10 * 3, dtype=np.uint8).reshape(10, 12, 3)
    found = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF"):
        whole = io.BytesIO()
        Image.fromarray(pixels).save(whole, kind)
        found.append(whole.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, "JPEG", exif=exif)
    return [*found, whole.getvalue()]


def _weights() -> list[bytes]:
    plain = {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{name}": t for name, t in plain.items()}}
    folded = {"batchnorm": '{"folded": [["float32", [2, 2]]]}'}
    write = safetensors.torch.save
    return [write(plain), write(plain, folded), write(averaged)]


def _torch_files() -> list[bytes]:
    found = []
    for zipped in (True, False):
        whole = io.BytesIO()
        state = {"state_dict": {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "epoch": 3}
        torch.save(state, whole, _use_new_zipfile_serialization=zipped)
        found.append(whole.getvalue())
    return found


def _history() -> dict[str, np.ndarray]:
    sizes = {"T": 2, "U": 3, "P": 1, "V": 1}
    return {name: np.ones([sizes[dim] for dim in dims]) for name, dims in history._DIMS.items()}


def _arrays() -> list[bytes]:
    found = []
    for write in (np.savez, np.savez_compressed):
        whole = io.BytesIO()
        write(whole, **{f"fc1/{name}": array for name, array in _history().items()})
        found.append(whole.getvalue())
    return found


def _histories() -> list[bytes]:
    return [json.dumps({"fc1": {name: array.tolist() for name, array in _history().items()}}).encode()]


def _populations() -> list[bytes]:
    header = {
        "format": 1,
        "weights": "x",
        "num_batches": 2,
        "layers": {"fc": {"count": 4, "calls": 2, "batches": 2, "squared_counts": 8.0}},
    }
    tensors = {
        "fc.mean": torch.zeros(3, dtype=torch.float64),
        "fc.biased_var": torch.ones(3, dtype=torch.float64),
        "fc.spread": torch.zeros(7, 3, dtype=torch.float64),
    }
    return [safetensors.torch.save(tensors, {"population": json.dumps(header)})]


def _normalized() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.BatchNorm1d(2))


def _domains() -> list[bytes]:
    domains = Domains(_normalized())
    domains.store("source")
    domains.store("usps")
    with TemporaryDirectory() as folder:
        domains.save(Path(folder) / "domains")
        return [(Path(folder) / "domains").read_bytes()]


def _usps() -> list[bytes]:
    whole = io.BytesIO()
    images, labels = np.zeros((2, 16, 16), dtype=np.uint8), np.array([3, 9])
    np.savez(whole, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return [whole.getvalue()]


def _documents() -> list[bytes]:
    facts = {"name": "digits", "image_shape": [28, 28], "num_train": 2, "num_test": 1, "sha256": "0"}
    run = {"format": 1, "recipe": bn_mlp().to_json(), "data": facts}
    return [json.dumps(run).encode()]


def _any_json() -> list[bytes]:
    return [b'{"a": [1, 2.5e3, null, true, "\\u00fc"]}', b"[" * 40 + b"]" * 40]


def _linear(path: Path) -> object:
    return load_weights(torch.nn.Linear(2, 3), path)


def _course() -> list[bytes]:
    course = {
        "format": 1,
        "name": "x",
        "recipe": bn_mlp().to_json(),
        "metrics": [{"step": 1, "accuracy": 0.5, "seconds": 1.0}],
        "diverged": None,
        "final": 0.5,
        "environment": {"cpu": "x"},
    }
    return [json.dumps(course).encode()]


def _claim(path: Path) -> object:
    (path.parent / "experiment.json").write_bytes(path.read_bytes())
    return claim_folder(path.parent, {"a": 1})


def _run(path: Path) -> object:
    (path.parent / "recipe.json").write_bytes(path.read_bytes())
    return read_run(path.parent)


def _saved(folder: Path) -> Path:
    return save_checkpoint(folder, Checkpoint(3, {"w": torch.ones(2)}, {}, {"accuracy": 0.5}))


def _checkpoint(path: Path) -> object:
    """The file as the state of a checkpoint whose other files are whole."""
    whole = _saved(path.parent)
    (whole / "state.json").write_bytes(path.read_bytes())
    find_checkpoint(path.parent, "newest")
    return load_checkpoint(whole)


def _state() -> list[bytes]:
    with TemporaryDirectory() as folder:
        return [(_saved(Path(folder)) / "state.json").read_bytes()]


def _index(path: Path) -> object:
    shard = path.with_name("train-000000.tar")
    shard.write_bytes(_tars()[0])
    os.utime(shard, ns=(7, 7))
    index_path(shard).write_bytes(path.read_bytes())
    return load_index(shard)


def _indexes() -> list[bytes]:
    written = {"format": 1, "bytes": len(_tars()[0]), "mtime_ns": 7}
    columns = {"names": ["a.jpg"], "offsets": [512], "sizes": [9], "labels": [1]}
    return [json.dumps(written | columns).encode()]


def _manifest(path: Path) -> object:
    for name in ("train-000000.tar", "val-000000.tar"):
        (path.parent / name).write_bytes(_tars()[0])
    (path.parent / "shards.json").write_bytes(path.read_bytes())
    return open_shards(path.parent)


def _manifests() -> list[bytes]:
    part = {name: {"shards": [{"name": f"{name}-000000.tar"}]} for name in ("train", "val")}
    return [json.dumps({"format": 1, "finished": True, **part}).encode()]


def _classes(path: Path) -> object:
    for name in ("train-000000.tar", "val-000000.tar"):
        (path.parent / name).write_bytes(_tars()[0])
    (path.parent / "classes.json").write_bytes(path.read_bytes())
    return open_shards(path.parent)


READERS = {
    reader.name: reader
    for reader in (
        Reader("images-idx3-ubyte", read_idx, (ValueError,), _idx),
        Reader("data_batch_1", lambda path: unpickle(path.read_bytes()), (ValueError,), _pickles),
        Reader("shard.tar", scan_shard, (ValueError,), _tars),
        Reader("shard.index.json", _index, (), _indexes),
        Reader("shards.json", _manifest, (ValueError, FileNotFoundError), _manifests),
        Reader("classes.json", _classes, (ValueError,), lambda: [b'["cat", "dog"]']),
        Reader(
            "picture",
            lambda path: read_crop(path.read_bytes(), lambda w, h: Box(0, 0, w, h), 8),
            (BadImage,),
            _pictures,
        ),
        Reader("weights.safetensors", _linear, (ValueError,), _weights),
        Reader("weights.pt", _linear, (ValueError,), _torch_files),
        Reader("foreign.pt", read_torch, (ValueError,), _torch_files),
        Reader("arrays.npz", read_arrays, (ValueError,), _arrays),
        Reader("history.npz", load_histories, (ValueError,), _arrays),
        Reader("history.json", load_histories, (ValueError,), _histories),
        Reader("population.safetensors", Population.load, (ValueError,), _populations),
        Reader(
            "domains.safetensors", lambda path: Domains.load(_normalized(), path), (ValueError,), _domains
        ),
        Reader("usps.npz", read_usps, (ValueError,), _usps),
        Reader("recipe", _run, (ValueError,), _documents),
        Reader("state", _checkpoint, (ValueError,), _state),
        Reader(
            "metrics.jsonl", read_metrics, (ValueError,), lambda: [b'{"step": 1}\n{"step": 2, "loss": 0.5}\n']
        ),
        Reader("course.json", Course.read, (ValueError, KeyError, TypeError), _course),
        Reader("experiment", _claim, (ValueError,), lambda: [b'{"a": 1}']),
        Reader("bench.json", occasions, (ValueError,), lambda: [b'{"occasions": [{"kind": "x"}]}']),
        Reader("document.json", read_json, (ValueError,), _any_json),
    )
}
"""By name."""
