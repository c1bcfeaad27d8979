import gc
import gzip
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import photograph_folder, picture, write_folder

from batchnorm.data import shards
from batchnorm.data.folders import ImageFolder, open_images
from batchnorm.data.pack import pack
from batchnorm.data.shard_index import index_path, load_index, read_index, scan_shard
from batchnorm.data.shards import ImageShards, expand

A, B = picture(1), picture(2)
GOOD = [("a.jpg", A), ("a.cls", b"1"), ("b.jpg", B), ("b.cls", b"0")]


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder of 23 and 7 images, and its shards of five."""
    base = tmp_path_factory.mktemp("packed")
    source = write_folder(base / "set", {"ape": 9, "bee": 8, "cat": 6}, {"ape": 3, "bee": 2, "cat": 2})
    pack(source, base / "shards", per_shard=5, progress=False)
    return source, base / "shards"


@pytest.mark.parametrize(
    "source",
    ["{}", "{}/train-{{000000..000004}}.tar"],
    ids=["folder", "pattern"],
)
def test_shards_hold_what_the_folder_holds_under_the_same_numbers(packed, source):
    folder, out = packed
    found = open_images(source.format(out))
    for part, images in (("train", found.train), ("val", found.val)):
        wanted = ImageFolder(folder / part, ("ape", "bee", "cat"), per_shard=5)
        assert images.classes == ("ape", "bee", "cat")
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == wanted.labels.tolist()
        assert images.shards.dtype == np.int64
        assert images.shards.tolist() == wanted.shards.tolist()
        assert [images.read(n) for n in range(len(images))] == [wanted.read(n) for n in range(len(wanted))]
    number = 7
    source = ImageFolder(folder / "train", per_shard=5).relative(number).replace("/", "_")
    assert found.train.name(number) == f"{out}/train-000001.tar:{number:08d}-{source}"


# It leaves the shards open that it has read.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_we_write(packed):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    _, out = packed
    images = open_images(out).train
    urls = f"{out}/train-{{000000..000004}}.tar"
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg", "cls"))
    gc.collect()
    assert [image for image, _ in samples] == [images.read(n) for n in range(len(images))]
    assert [int(label) for _, label in samples] == images.labels.tolist()


def test_we_read_what_webdataset_writes(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    for part, first in (("train", 0), ("val", 20)):
        with webdataset.ShardWriter(f"{tmp_path}/{part}-%06d.tar", maxcount=4, verbose=0) as sink:
            for number in range(first, first + 10):
                key = f"some/folder/sample{number}"
                sink.write({"__key__": key, "jpg": picture(number), "cls": number % 3, "json": {"more": 1}})
    found = open_images(f"{tmp_path}/train-{{000000..000002}}.tar")
    assert found.classes == ("0", "1", "2")
    assert [found.train.read(n) for n in range(10)] == [picture(n) for n in range(10)]
    assert found.train.labels.tolist() == [n % 3 for n in range(10)]
    assert found.train.shards.tolist() == [0, 4, 8, 10]
    assert found.val.read(3) == picture(23)
    assert found.val.name(3).endswith("val-000000.tar:some/folder/sample23.jpg")


@pytest.mark.parametrize(
    "members",
    [
        pytest.param([("a.cls", b"1\n"), ("a.jpg", A), ("b.cls", b" 0"), ("b.jpg", B)], id="label first"),
        pytest.param(
            [("a.jpg", A), ("a.json", b'{"label": 1}'), ("b.jpg", B), ("b.json", b'{"label": 0}')], id="json"
        ),
        pytest.param([("a.jpg", A), ("a.json", b'{"label": 7}'), ("a.cls", b"1"), *GOOD[2:]], id="cls first"),
        pytest.param([*GOOD, ("a.txt", b"about"), (".b.jpg", b""), ("a.seg.png", b"")], id="other members"),
        pytest.param([("A/a.JPEG", A), ("A/a.CLS", b"1"), ("B/a.jpg", B), ("B/a.cls", b"0")], id="folders"),
        pytest.param([(f"{'x' * 150}.jpg", A), (f"{'x' * 150}.cls", b"1"), *GOOD[2:]], id="long names"),
        pytest.param([("é.jpg", A), ("é.cls", b"1"), *GOOD[2:]], id="not ASCII"),
    ],
)
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["PAX", "GNU"])
def test_ways_to_write_the_same(tmp_path, members, format):
    images = ImageShards([write_tar(tmp_path / "x.tar", members, format)])
    assert [images.read(0), images.read(1)] == [A, B]
    assert images.labels.tolist() == [1, 0]


def test_folders_in_the_archive_and_an_empty_shard_do_no_harm(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("x.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    write_tar(tmp_path / "b.tar", GOOD)
    images = ImageShards([tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / "a.tar"])
    assert images.shards.tolist() == [0, 2]
    assert images.read(1) == B
    assert images.name(1) == f"{tmp_path}/b.tar:b.jpg"


def test_any_order_of_reading_with_few_files_open(packed, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    images = open_images(packed[1]).train
    whole = [images.read(n) for n in range(len(images))]
    before = len(os.listdir("/proc/self/fd"))
    for number in np.random.default_rng(0).integers(0, len(images), 200):
        assert images.read(int(number)) == whole[number]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    again = pickle.loads(pickle.dumps(images))
    assert [again.read(n) for n in range(len(again))] == whole
    del images, again
    assert len(os.listdir("/proc/self/fd")) < before


def test_numbers_outside(packed):
    images = open_images(packed[1]).train
    for number in (-1, 23):
        with pytest.raises(IndexError, match=f"{number} "):
            images.read(number)


def test_index_is_used_while_it_fits_and_made_anew_when_not(packed, tmp_path, monkeypatch):
    shard = tmp_path / "x.tar"
    original = packed[1] / "train-000000.tar"
    shard.write_bytes(original.read_bytes())
    os.utime(shard, ns=(original.stat().st_atime_ns, original.stat().st_mtime_ns))
    index_path(shard).write_bytes(index_path(original).read_bytes())
    scanned = scan_shard(shard)
    assert read_index(shard)[0] == scanned

    with monkeypatch.context() as patch:
        patch.setattr("batchnorm.data.shard_index.scan_shard", lambda _: pytest.fail("scanned again"))
        assert load_index(shard) == scanned
    os.utime(shard)
    assert read_index(shard) is None
    assert load_index(shard) == scanned


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda index: b"", id="empty"),
        pytest.param(lambda index: b"[]", id="a list"),
        pytest.param(lambda index: json.dumps(index | {"format": 0}).encode(), id="another format"),
        pytest.param(lambda index: json.dumps(index | {"labels": [0]}).encode(), id="a label too few"),
        pytest.param(lambda index: json.dumps(index | {"labels": ["0"] * 5}).encode(), id="words"),
        pytest.param(lambda index: json.dumps(index | {"bytes": 7}).encode(), id="another size"),
        pytest.param(lambda index: json.dumps({"format": 1}).encode(), id="nothing in it"),
    ],
)
def test_index_that_is_none_costs_a_scan(packed, tmp_path, spoil):
    original = packed[1] / "train-000000.tar"
    shard = tmp_path / "x.tar"
    shard.write_bytes(original.read_bytes())
    os.utime(shard, ns=(original.stat().st_atime_ns, original.stat().st_mtime_ns))
    index_path(shard).write_bytes(spoil(json.loads(index_path(original).read_bytes())))
    assert read_index(shard) is None
    assert load_index(shard) == scan_shard(original)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        pytest.param(
            [*GOOD, ("a.jpg", B)],
            r"key a comes twice, as a\.jpg at offset 0 and as a\.jpg at offset \d+",
            id="key",
        ),
        pytest.param([*GOOD, ("a.png", B)], r"key a comes twice, as a\.jpg .* as a\.png", id="two endings"),
        pytest.param([*GOOD, ("b.cls", b"2")], r"key b comes twice, as b\.cls", id="two labels"),
        pytest.param([*GOOD, ("c.jpg", B)], r"c has no label: neither c\.cls.* nor c\.json", id="no label"),
        pytest.param([*GOOD, ("c.cls", b"1")], r"c \(1 labels\) without an image.*\.webp", id="no image"),
        pytest.param([("a.jpg", A), ("a.cls", b"ape")], r"a\.cls should give .* holds b'ape'", id="a word"),
        pytest.param([("a.jpg", A), ("a.cls", b"")], r"a\.cls should give .* holds b''", id="empty label"),
        pytest.param([("a.jpg", A), ("a.cls", b"-1")], r"from 0 on, and holds b'-1'", id="negative"),
        pytest.param([("a.jpg", A), ("a.cls", b"1.5")], r"a whole number .* b'1\.5'", id="a fraction"),
        pytest.param(
            [("a.jpg", A), ("a.json", b'{"x": 1}')], r"a\.json should give the label", id="json without"
        ),
        pytest.param([("a.jpg", A), ("a.json", b'{"label": true}')], r"a\.json should give", id="json true"),
        pytest.param([("a.jpg", A), ("a.json", b"{")], r"a\.json should give the label", id="damaged json"),
        pytest.param([("readme", b"nothing")], r"No image in .*x\.tar", id="no images"),
        pytest.param([], r"No image in .*x\.tar", id="nothing"),
    ],
)
def test_what_is_wrong_with_a_shard_is_said(tmp_path, members, says):
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=says) as caught:
        ImageShards([path])
    assert str(path) in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_cut_is_refused_with_its_place(tmp_path_factory, data):
    path = write_tar(tmp_path_factory.mktemp("cut") / "x.tar", GOOD)
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    cuts = st.integers(0, end + 511)
    size = data.draw(cuts | cuts.map(lambda cut: cut // 512 * 512))
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=r"is cut off|no intact tar") as caught:
        scan_shard(path)
    message = str(caught.value)
    assert str(path) in message
    # The first block that is not there, or the header of the member that is not all there.
    assert int(re.search(r"offset (\d+)", message)[1]) < size + 512
    assert size < 512 or f"ends after {size} bytes" in message


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        pytest.param(gzip.compress, "is compressed.*gunzip", id="compressed"),
        pytest.param(lambda _: b"<html>" * 1000, "no intact tar file: at offset 0", id="an error page"),
        pytest.param(
            lambda tar: tar[:1024] + b"x" * 512 + tar[1536:],
            "no intact tar file: at offset 1024 there is a bad header",
            id="damaged header",
        ),
        pytest.param(lambda tar: tar[:1536], "cut off: it ends after 1536", id="cut"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path, spoil, says):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", A[:500]), ("a.cls", b"0")])
    whole = path.read_bytes()
    assert whole[1024:1029] == b"a.cls"
    path.write_bytes(spoil(whole))
    with pytest.raises(ValueError, match=says) as caught:
        scan_shard(path)
    assert str(path) in str(caught.value)


def test_shard_cut_after_it_was_opened(tmp_path):
    path = write_tar(tmp_path / "x.tar", GOOD)
    images = ImageShards([path])
    os.truncate(path, 600)
    with pytest.raises(OSError, match=rf"x\.tar:a\.jpg: {len(A)} bytes expected at offset 512, 88 found"):
        images.read(0)


def test_labels_out_of_range_are_named(tmp_path):
    write_tar(tmp_path / "train-0.tar", [*GOOD, ("c.jpg", B), ("c.cls", b"2")])
    write_tar(tmp_path / "val-0.tar", GOOD)
    (tmp_path / "classes.json").write_text('["ape", "bee"]')
    with pytest.raises(
        ValueError, match=r"1 labels are out of range: .*train-0\.tar:c\.jpg \(label 2\).* 0 to 1"
    ):
        open_images(tmp_path / "train-0.tar")


def test_validation_label_that_training_has_not(tmp_path):
    write_tar(tmp_path / "train-0.tar", GOOD)
    write_tar(tmp_path / "val-0.tar", [*GOOD, ("c.jpg", B), ("c.cls", b"2")])
    with pytest.raises(ValueError, match=r"val-0\.tar:c\.jpg \(label 2\).*There are 2 classes"):
        open_images(tmp_path / "train-0.tar")


def test_missing_shards_are_named(packed, tmp_path):
    _, out = packed
    with pytest.raises(
        FileNotFoundError, match=r"2 of 7 shards are missing: .*train-000005\.tar, .*correct the"
    ):
        open_images(f"{out}/train-{{000000..000006}}.tar")
    for path in out.iterdir():
        if path.name != "val-000001.tar":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(FileNotFoundError, match=r"lacks val-000001\.tar, which its shards\.json names"):
        open_images(tmp_path)
    (tmp_path / "train-000002.tar").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train-\*\.tar, numbers 2 are missing \(the last is train-000004"
    ):
        open_images(tmp_path)


def test_validation_shards_may_be_named(packed, tmp_path):
    _, out = packed
    (tmp_path / "held-out.tar").write_bytes((out / "val-000000.tar").read_bytes())
    found = open_images(out, val=tmp_path / "held-out.tar")
    assert len(found.val) == 5
    found = open_images(out / "train-000003.tar", val=tmp_path / "held-out.tar")
    assert (len(found.train), len(found.val)) == (5, 5)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        pytest.param("x/train-{0..}.tar", "is not understood: .*one range", id="half a range"),
        pytest.param("x/train-{3..1}.tar", "is not understood", id="backwards"),
        pytest.param("x/train-{a,b}.tar", "is not understood", id="alternatives"),
        pytest.param("x/{0..1}-{0..1}.tar", "is not understood", id="two ranges"),
    ],
)
def test_patterns_that_are_not_understood(pattern, says):
    with pytest.raises(ValueError, match=says):
        open_images(pattern)


def test_patterns():
    names = [path.name for path in expand("a/train-{000098..000101}.tar")]
    assert names == [f"train-{number:06d}.tar" for number in (98, 99, 100, 101)]
    assert [str(path) for path in expand("{9..11}.tar")] == ["9.tar", "10.tar", "11.tar"]
    assert [str(path) for path in expand("a/b.tar")] == ["a/b.tar"]


def test_validation_shards_that_cannot_be_guessed_or_are_not_there(tmp_path):
    write_tar(tmp_path / "part-0.tar", GOOD)
    with pytest.raises(ValueError, match="cannot be guessed, as its name does not say train"):
        open_images(tmp_path / "part-0.tar")
    write_tar(tmp_path / "my-train-0.tar", GOOD)
    with pytest.raises(FileNotFoundError, match=r"no shards .*my-val-\*\.tar"):
        open_images(tmp_path / "my-train-0.tar")


@pytest.mark.parametrize("content", ["{", "{}", "[]", "[1, 2]"], ids=["cut", "an object", "empty", "numbers"])
def test_names_of_classes_must_be_a_list(tmp_path, content):
    write_tar(tmp_path / "train-0.tar", GOOD)
    write_tar(tmp_path / "val-0.tar", GOOD)
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(ValueError, match=r"classes\.json .*list of the classes' names"):
        open_images(tmp_path / "train-0.tar")


def test_packing_that_was_not_finished(packed, tmp_path):
    for path in packed[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((tmp_path / "shards.json").read_bytes())
    (tmp_path / "shards.json").write_text(
        json.dumps({"format": 1, "finished": False, "packing": manifest["packing"]})
    )
    with pytest.raises(
        ValueError, match="not packed to the end: give the same batchnorm shards command again"
    ):
        open_images(tmp_path)


def test_reading_needs_no_webdataset(packed):
    program = (
        "import sys\n"
        "from batchnorm.data.folders import open_images\n"
        f"assert len(open_images({str(packed[1])!r}).train.read(0)) > 100\n"
        "assert 'webdataset' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_photographs_come_back_from_shards(tmp_path):
    source = photograph_folder(tmp_path / "set")
    pack(source, tmp_path / "shards", per_shard=30, progress=False)
    folder, packed = open_images(source), open_images(tmp_path / "shards")
    assert packed.classes == folder.classes
    assert packed.train.shards.tolist() == [0, 30, 60, 90, 100]
    for one, other in ((folder.train, packed.train), (folder.val, packed.val)):
        assert one.labels.tolist() == other.labels.tolist()
        assert all(one.read(number) == other.read(number) for number in range(100))
