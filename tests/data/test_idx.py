import gzip
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from batchnorm.data.idx import DTYPES, MAX_BYTES, read_idx


def encode(array, code):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) * 10
INTACT = encode(IMAGES, 0x08)


@pytest.mark.parametrize("code", DTYPES, ids=lambda code: f"0x{code:02x}")
@pytest.mark.parametrize("wrap", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_every_element_type_comes_back_in_native_order(tmp_path, code, wrap):
    dtype = DTYPES[code].newbyteorder("=")
    array = np.array([[0, 1, 100], [7, 13, 2]], dtype=dtype) - (0 if dtype == np.uint8 else 50)
    path = tmp_path / "a.idx"
    path.write_bytes(wrap(encode(array, code)))
    got = read_idx(path)
    assert got.dtype == dtype
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, array)


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_any_shape_comes_back_and_any_cut_is_refused(tmp_path_factory, data):
    array = data.draw(arrays.arrays(np.uint8, arrays.array_shapes(max_dims=4, min_side=0, max_side=5)))
    whole = encode(array, 0x08)
    path = tmp_path_factory.mktemp("idx") / "a.idx"
    path.write_bytes(whole)
    np.testing.assert_array_equal(read_idx(path), array)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="expected"):
        read_idx(path)


def header(code, *sizes):
    return struct.pack(f">BBBB{len(sizes)}I", 0, 0, code, len(sizes), *sizes)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "begins with two zero bytes", id="empty"),
        pytest.param(b"\0\0\x08", "begins with two zero bytes", id="three bytes"),
        pytest.param(b"<html>not found</html>", "begins with two zero bytes", id="an error page"),
        pytest.param(header(0x07, 2) + b"ab", "element type", id="unknown element type"),
        pytest.param(b"\0\0\x08\0" + b"a", "dimensions", id="no dimensions"),
        pytest.param(header(0x08, *[1] * 9) + b"a", "dimensions", id="nine dimensions"),
        pytest.param(header(0x08, 2, 3)[:-1], "bytes of sizes", id="header cut off"),
        pytest.param(INTACT[:-1], "24 bytes of data .* found 23", id="one byte short"),
        pytest.param(INTACT + b"\0", "end of the file", id="one byte too many"),
        pytest.param(header(0x08, 2**32 - 1, 2**32 - 1) + b"a", f"at most {MAX_BYTES}", id="absurd size"),
        pytest.param(gzip.compress(INTACT)[:-9], "damaged", id="gzip cut in its data"),
        pytest.param(gzip.compress(INTACT)[:-4], "damaged", id="gzip cut in its checksum"),
        pytest.param(gzip.compress(INTACT)[:-8] + b"\0" * 8, "damaged", id="gzip with a wrong checksum"),
        pytest.param(b"\x1f\x8b" + b"\xff" * 30, "damaged", id="gzip header of nonsense"),
        pytest.param(gzip.compress(INTACT[:-5]), "cut off", id="intact gzip of a cut file"),
    ],
)
def test_bad_content_is_refused_by_name(tmp_path, content, says):
    path = tmp_path / "train-images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    assert "fetch it again" in str(caught.value)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "nothing")
