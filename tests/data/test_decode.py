"""Crops against the whole picture decoded, turned and resized in float64; bad bytes; shared work."""

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin

from batchnorm.data import decode
from batchnorm.data.crops import Box, Crop, evaluation_crops, random_area_box
from batchnorm.data.decode import BadImage, read_crop, read_crops

ORIENTATION = 0x0112


def scene(width, height, seed=0):
    """Something like a photograph: soft shading, an edge, some grain; uint8 of shape (height, width, 3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height, 2)
    waves = [np.sin(2 * np.pi * (a * x + b * y) + c) for a, b, c in rng.uniform(0.5, 4, (3, 3))]
    levels = 128 + 60 * np.stack(waves, axis=-1) + 40 * (x > y)[..., None]
    return np.clip(levels + rng.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)


def encode(pixels, format="JPEG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if (orientation := options.pop("orientation", None)) is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif.tobytes()
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


jpeg = partial(encode, format="JPEG", quality=92)


def upright(data):
    """All of the picture, as ImageOps turns it: (height, width, 3)."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)).convert("RGB")))


def taps(length, start, extent, size):
    """Weights of an antialiased bilinear filter, (size, length)."""
    scale = extent / size
    centres = start + (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def truth(picture, box, size, *, window=False):
    """A box cut from a whole picture and resized in float64, (3, size, size); or a window of it resized."""
    if not window and all(side == int(side) for side in box):
        left, top, width, height = map(int, box)
        picture, box = picture[top : top + height, left : left + width], Box(0, 0, width, height)
    height, width, _ = picture.shape
    rows = taps(height, box.top, box.height, size)
    columns = taps(width, box.left, box.width, size)
    return np.stack([rows @ picture[..., band].astype(np.float64) @ columns.T for band in range(3)])


def assert_near(got, wanted, *, worst=1.0):
    """Pillow rounds twice, after columns and after rows: by a level at most."""
    assert got.dtype == np.uint8
    assert np.abs(got - wanted).max() <= worst + 1e-9


PLACES = [
    pytest.param(Box(13, 7, 90, 70), 36, id="shrunk"),
    pytest.param(Box(13, 7, 21, 30), 32, id="enlarged"),
    pytest.param(Box(0, 0, 150, 101), 51, id="the whole picture"),
    pytest.param(Box(150 - 41, 101 - 40, 41, 40), 39, id="bottom right"),
    pytest.param(Box(10.25, 3.5, 60.125, 77.0), 40, id="fractions of pixels"),
    pytest.param(Box(140.5, 0.0, 0.5, 0.25), 8, id="less than a pixel"),
]


@pytest.mark.parametrize(("box", "size"), PLACES)
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"])
def test_a_box_is_cut_and_resized_as_in_float64(box, size, format, grey):
    pixels = scene(150, 101)
    data = encode(pixels[..., 0] if grey else pixels, format)
    assert_near(read_crop(data, lambda *_: box, size), truth(upright(data), box, size))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientations(orientation, format):
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(scene(120, 81), format, orientation=orientation, **options)
    picture = upright(data)
    seen = []

    def choose(width, height):
        seen.append((width, height))
        return Box(5, 30, 41, 41)

    got = read_crop(data, choose, 41)
    assert seen == [(81, 120) if orientation >= 5 else (120, 81)]
    # Nothing to resize, so nothing may differ.
    np.testing.assert_array_equal(got, picture[30:71, 5:46].transpose(2, 0, 1))
    box = Box(3.5, 11, 60, 47)
    assert_near(read_crop(data, lambda *_: box, 24), truth(picture, box, 24))


def test_a_portrait_lying_on_its_side():
    """Stored as a landscape, with orientation 6: to be turned to the right. Its top left is red."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[32:, :32] = (255, 0, 0)
    data = encode(pixels, "PNG", orientation=6)
    got = read_crop(data, lambda width, height: Box(0, 0, width, height - 32), 64)
    # Upright it is 64 wide and 96 high: red is the left half of the upper third.
    np.testing.assert_array_equal(got[0, :32, :32], 255)
    assert got.astype(int).sum() == 255 * 32 * 32


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_mirrored(orientation):
    data = jpeg(scene(64, 50), orientation=orientation)
    box = Box(4, 2, 40, 30)
    plain = read_crop(data, lambda *_: Crop(box, False), 20)
    mirrored = read_crop(data, lambda *_: Crop(box, True), 20)
    np.testing.assert_array_equal(mirrored, plain[:, :, ::-1])
    np.testing.assert_array_equal(read_crop(data, lambda *_: box, 20), plain)


@pytest.mark.parametrize("orientation", [0, 9, 65535], ids=["zero", "nine", "nonsense"])
def test_an_orientation_that_does_not_exist_is_none(orientation):
    plain = jpeg(scene(40, 30))
    whole = lambda width, height: Box(0, 0, width, height)  # noqa: E731
    np.testing.assert_array_equal(
        read_crop(jpeg(scene(40, 30), orientation=orientation), whole, 16), read_crop(plain, whole, 16)
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_notes_do_not_spoil_a_picture():
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 20
    data = jpeg(scene(40, 30), exif=exif)
    box = Box(0, 0, 40, 30)
    np.testing.assert_array_equal(
        read_crop(data, lambda *_: box, 16), read_crop(jpeg(scene(40, 30)), lambda *_: box, 16)
    )


@pytest.fixture
def drafts(monkeypatch):
    """The sizes at which JPEGs were decoded."""
    sizes, load = [], JpegImagePlugin.JpegImageFile.load_prepare

    def noted(image):
        sizes.append(image.size)
        load(image)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load_prepare", noted)
    return sizes


@pytest.mark.parametrize(
    ("box", "size", "decoded"),
    [
        pytest.param(Box(0, 0, 601, 601), 100, (201, 151), id="of 6 the next smaller, 4"),
        pytest.param(Box(3, 5, 512, 512), 64, (101, 68), id="exactly an eighth"),
        pytest.param(Box(3, 5, 511, 512), 64, (201, 136), id="a pixel less"),
        pytest.param(Box(3, 5, 512, 256), 128, (401, 140), id="the shorter side decides"),
        pytest.param(Box(3, 1, 255, 600), 128, (801, 601), id="not even half"),
    ],
)
@pytest.mark.parametrize("orientation", [1, 5])
def test_jpegs_are_decoded_no_larger_than_needed(drafts, box, size, decoded, orientation):
    if orientation == 5:
        box = Box(box.top, box.left, box.height, box.width)
    data = jpeg(scene(801, 601), orientation=orientation)
    got = read_crop(data, lambda *_: box, size)
    assert drafts == [decoded]
    # The decoder's averages are a little sharper or softer than the filter, but nothing is displaced.
    assert np.abs(got - truth(upright(data), box, size)).mean() < 1.0


@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_reduced_pictures_are_not_displaced(reduction):
    """A ramp of one level a pixel: half a pixel of the result would be 1, 2 or 4 levels."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (200, 256, 3))
    data = jpeg(np.ascontiguousarray(ramp), subsampling=0)
    size = 96 // reduction
    got = read_crop(data, lambda *_: Box(61, 50, 96, 96), size)
    wanted = 61 + (np.arange(size) + 0.5) * reduction - 0.5
    np.testing.assert_allclose(got.mean(axis=(0, 1)), wanted, atol=0.6)


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_rows_below_a_crop_are_not_decoded(drafts, subsampling, orientation):
    """And those above are the same to the bit, whatever the decoder takes from their neighbours."""
    data = jpeg(scene(96, 200), subsampling=subsampling, restart_marker_rows=2, orientation=orientation)
    picture = upright(data)
    for lowest in (64, 65, 70, 90, 111, 150, 184, 199):
        # Its lowest row in the file.
        box = {
            1: Box(3, lowest - 50, 50, 50),
            3: Box(3, 200 - lowest, 50, 50),
            6: Box(200 - lowest, 3, 50, 50),
        }[orientation]
        got = read_crop(data, lambda *_, box=box: box, 50)
        left, top, _, _ = map(int, box)
        np.testing.assert_array_equal(got, picture[top : top + 50, left : left + 50].transpose(2, 0, 1))
    # Two rows more, as resizing may look a pixel further, and 16 to spare; the first is the whole picture.
    assert [height for _, height in drafts] == [200, 82, 83, 88, 108, 129, 168, 200, 200]


@pytest.mark.parametrize(
    ("options", "tail"),
    [
        pytest.param({"progressive": True}, b"", id="progressive"),
        pytest.param({}, b"\0", id="something behind its end"),
    ],
)
def test_other_jpegs_are_decoded_to_the_end(drafts, options, tail):
    data = jpeg(scene(96, 200), **options) + tail
    got = read_crop(data, lambda *_: Box(0, 0, 50, 50), 50)
    assert drafts == [(96, 200)]
    np.testing.assert_array_equal(got, upright(data)[:50, :50].transpose(2, 0, 1))


def png(color_type, depth, rows, *extra, width=None, height=None):
    """A PNG by hand, for what Pillow does not write."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    height = height or len(rows)
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [
        chunk(b"IHDR", header),
        *(chunk(*one) for one in extra),
        chunk(b"IDAT", body),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


WIDE = np.array([[[0x1234, 0xFFFF, 0x00FF], [0, 0x80FF, 0x7F00]]], np.uint16)
PALETTE = bytes([0, 0, 0, 200, 10, 20, 30, 220, 40])

KINDS = [
    pytest.param(encode(np.uint8([[7, 250]]), "PNG"), [[7, 250]] * 3, id="grey"),
    pytest.param(
        png(0, 16, [WIDE[0, :, 0].astype(">u2").tobytes()], width=2), [[0x12, 0]] * 3, id="16-bit grey"
    ),
    pytest.param(
        png(2, 16, [WIDE[0].astype(">u2").tobytes()], width=2),
        [[0x12, 0], [0xFF, 0x80], [0, 0x7F]],
        id="16-bit RGB",
    ),
    pytest.param(png(0, 1, [b"\x40"], width=2), [[0, 255]] * 3, id="one bit"),
    pytest.param(
        png(3, 8, [b"\x01\x02"], (b"PLTE", PALETTE), (b"tRNS", b"\xff\x00\x80"), width=2),
        [[200, 30], [10, 220], [20, 40]],
        id="palette with transparency of each colour",
    ),
    pytest.param(
        png(3, 8, [b"\x01\x02"], (b"PLTE", PALETTE), (b"tRNS", b"\xff\x00"), width=2),
        [[200, 30], [10, 220], [20, 40]],
        id="palette with one transparent colour",
    ),
    pytest.param(encode(np.uint8([[[7, 0], [250, 9]]]), "PNG"), [[7, 250]] * 3, id="grey and alpha"),
    pytest.param(
        encode(np.uint8([[[1, 2, 3, 0], [4, 5, 6, 128]]]), "PNG"),
        [[1, 4], [2, 5], [3, 6]],
        id="RGB and alpha",
    ),
    pytest.param(
        png(2, 8, [bytes([1, 2, 3, 4, 5, 6])], (b"tRNS", bytes([0, 1, 0, 2, 0, 3])), width=2),
        [[1, 4], [2, 5], [3, 6]],
        id="RGB with one transparent colour",
    ),
    pytest.param(
        encode(Image.fromarray(np.uint16([[0x1234, 0xFF00]])), "TIFF"), [[0x12, 0xFF]] * 3, id="16-bit TIFF"
    ),
]


@pytest.mark.parametrize(("data", "levels"), KINDS)
def test_every_kind_of_pixel_becomes_rgb(data, levels):
    for at in (0, 1):
        got = read_crop(data, lambda *_, at=at: Box(at, 0, 1, 1), 1)
        assert got.shape == (3, 1, 1)
        assert got[:, 0, 0].tolist() == [channel[at] for channel in levels]


def test_grey_jpeg():
    grey = scene(90, 70)[..., 1]
    data = jpeg(grey)
    box = Box(3, 4, 80, 60)
    got = read_crop(data, lambda *_: box, 32)
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[0], got[2])
    assert_near(got, truth(upright(data), box, 32))


def test_cmyk_jpeg_with_adobes_inverted_inks():
    inks = np.zeros((16, 64, 4), np.uint8)
    inks[:, :16] = (0, 255, 255, 0)
    inks[:, 16:32] = (255, 0, 255, 0)
    inks[:, 32:48] = (0, 0, 0, 0)
    inks[:, 48:] = (0, 0, 0, 128)
    data = jpeg(Image.fromarray(inks, "CMYK"))
    assert b"Adobe" in data
    got = read_crop(data, lambda *_: Box(0, 0, 64, 16), 16).astype(int)
    centres = got[:, 8, [1, 6, 9, 14]].T
    # Red, green, white, and half of black.
    np.testing.assert_allclose(centres, [[255, 0, 0], [0, 255, 0], [255] * 3, [127] * 3], atol=6)


def test_a_jpeg_by_any_other_name_and_two_pictures_in_one_file():
    data = encode(
        Image.fromarray(scene(40, 30)),
        "MPO",
        save_all=True,
        append_images=[Image.fromarray(scene(40, 30, 1))],
    )
    got = read_crop(data, lambda *_: Box(0, 0, 30, 30), 30)
    first = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(got, first[:30, :30].transpose(2, 0, 1))


def test_the_first_frame_of_several():
    frames = [Image.fromarray(np.full((9, 9), level, np.uint8)) for level in (40, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert set(read_crop(data, lambda *_: Box(0, 0, 9, 9), 5).flat) == {40}


SIZES = [
    pytest.param(1, 1, id="one pixel"),
    pytest.param(2400, 1600, id="2400 pixels"),
    pytest.param(2400, 3, id="a strip"),
    pytest.param(1, 2400, id="a line"),
]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_pictures_of_any_size(width, height):
    pixels = np.full((height, width, 3), (30, 90, 200), np.uint8)
    data = encode(pixels, "PNG" if width * height < 10_000 else "JPEG")
    rng = np.random.default_rng(0)
    got = [read_crop(data, lambda w, h: random_area_box(w, h, rng), 224)]
    for num in (1, 10, 144):
        crops = read_crops(data, lambda w, h, num=num: evaluation_crops(w, h, num, 32), 32)
        assert crops.shape == (num, 3, 32, 32)
        got.append(crops[[0, -1]].reshape(6, 32, 32)[:3])
    for picture in got:
        np.testing.assert_allclose(picture.mean(axis=(1, 2)), (30, 90, 200), atol=1.5)
        assert np.ptp(picture.reshape(3, -1), axis=1).max() <= 2


INTACT = {
    "JPEG": jpeg(scene(70, 50)),
    "progressive JPEG": jpeg(scene(70, 50), progressive=True),
    "PNG": encode(scene(70, 50), "PNG"),
    "WEBP": encode(scene(70, 50), "WEBP"),
    "GIF": encode(Image.fromarray(scene(70, 50)).quantize(64), "GIF"),
    "BMP": encode(scene(70, 50), "BMP"),
    "TIFF": encode(scene(70, 50), "TIFF"),
    "compressed TIFF": encode(scene(70, 50), "TIFF", compression="tiff_lzw"),
}


def centre(data):
    return read_crop(data, lambda width, height: evaluation_crops(width, height)[0], 24, name="a/b.jpg")


@pytest.mark.parametrize("kind", INTACT)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.6, 0.9, 0.98])
def test_a_file_cut_off_is_refused_by_name(kind, share):
    data = INTACT[kind][: int(share * len(INTACT[kind]))]
    with pytest.raises(BadImage, match=r"a/b\.jpg: "):
        centre(data)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), kind=st.sampled_from(list(INTACT)))
def test_a_file_cut_anywhere_is_refused_or_lacks_no_pixel(data, kind):
    whole = INTACT[kind]
    cut = data.draw(st.integers(0, len(whole) - 1))
    try:
        got = centre(whole[:cut])
    except BadImage:
        return
    np.testing.assert_array_equal(got, centre(whole))


@settings(deadline=None, max_examples=300)
@given(data=st.data(), kind=st.sampled_from(list(INTACT)))
def test_whatever_is_damaged_nothing_else_is_raised(data, kind):
    content = bytearray(INTACT[kind])
    header = st.integers(0, min(len(content) - 1, 700))
    places = st.lists(st.tuples(header | st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1)
    for at, value in data.draw(places):
        content[at] = value
    try:
        got = centre(bytes(content))
    except BadImage:
        return
    assert got.shape == (3, 24, 24)


@settings(deadline=None, max_examples=100)
@given(
    content=st.binary(max_size=300), magic=st.sampled_from([b"", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0"])
)
def test_noise_is_no_picture(content, magic):
    with pytest.raises(BadImage):
        centre(magic + content)


def test_a_cut_is_seen_where_programs_tolerate_them(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for whole in INTACT.values():
        with pytest.raises(BadImage):
            centre(whole[: len(whole) // 2])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"", "a/b.jpg: an empty file", id="no bytes"),
        pytest.param(b"Not found.\n", "expected a picture.*b'Not found", id="a text file"),
        pytest.param(b"\0" * 5000, "expected a picture", id="zeros"),
        pytest.param(
            b"<svg xmlns='http://www.w3.org/2000/svg'/>", "expected a picture .JPEG, PNG", id="another format"
        ),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", "expected a picture", id="a program"),
        pytest.param(INTACT["JPEG"][:200], "a/b.jpg", id="a header alone"),
        pytest.param(
            png(2, 8, [b"\0"], width=30_000, height=30_000), "900000000|900,000,000|30000×30000", id="a bomb"
        ),
        pytest.param(
            encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
            "no known white",
            id="floating point",
        ),
    ],
)
def test_what_is_no_picture_says_so(data, says):
    with pytest.raises(BadImage, match=says) as caught:
        centre(data)
    assert isinstance(caught.value, ValueError)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_bomb_is_refused_even_where_it_is_only_warned_of():
    with pytest.raises(BadImage, match="found 10000×10000"):
        centre(png(2, 8, [b"\0"], width=10_000, height=10_000))


def test_errors_of_the_caller_are_its_own():
    data = jpeg(scene(40, 30))
    with pytest.raises(ZeroDivisionError):
        read_crop(data, lambda *_: 1 // 0, 8)


@pytest.mark.parametrize(
    "box",
    [
        pytest.param(Box(-1, 0, 9, 9), id="left of it"),
        pytest.param(Box(0, 0, 41, 9), id="right of it"),
        pytest.param(Box(0, 25, 9, 6), id="below it"),
        pytest.param(Box(0, 0, 0, 9), id="empty"),
        pytest.param(Box(0, 0, 9, -1), id="inside out"),
        pytest.param(Box(0, float("nan"), 9, 9), id="no number"),
    ],
)
def test_a_box_outside_is_the_callers_fault(box):
    with pytest.raises(ValueError, match="within the 40×30 picture") as caught:
        read_crop(jpeg(scene(40, 30)), lambda *_: box, 8)
    assert not isinstance(caught.value, BadImage)


def test_no_size():
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        read_crop(jpeg(scene(40, 30)), lambda *_: Box(0, 0, 9, 9), 0)


def test_no_crops():
    assert read_crops(jpeg(scene(40, 30)), lambda *_: [], 8).shape == (0, 3, 8, 8)


@pytest.fixture
def resizes(monkeypatch):
    """Widths and heights to which pictures were resized."""
    sizes, resize, interpolate = [], Image.Image.resize, F.interpolate

    def noted_resize(image, size, *arguments):
        sizes.append(size)
        return resize(image, size, *arguments)

    def noted_interpolate(tensor, size, **options):
        sizes.append(size[::-1])
        return interpolate(tensor, size, **options)

    monkeypatch.setattr(Image.Image, "resize", noted_resize)
    monkeypatch.setattr(F, "interpolate", noted_interpolate)
    return sizes


SCALES_OF_LANDSCAPE = [(341, 256), (384, 288), (427, 320), (469, 352)]


@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_144_crops_share_their_work(resizes, drafts, orientation, grey):
    stored = (500, 375) if orientation == 1 else (375, 500)
    pixels = scene(*stored)
    data = jpeg(pixels[..., 0] if grey else pixels, orientation=orientation)
    crops = read_crops(data, lambda width, height: evaluation_crops(width, height, 144), 224)
    assert drafts == [stored]
    scales = SCALES_OF_LANDSCAPE if orientation == 1 else [size[::-1] for size in SCALES_OF_LANDSCAPE]
    assert sorted(resizes) == sorted([(224, 224)] * 12 + scales)

    picture = upright(data)
    chosen = evaluation_crops(500, 375, 144)
    for number in (0, 9, 10, 23, 47, 70, 100, 131, 143):
        box, mirrored, resized = chosen[number]
        wanted = truth(picture, box, 224, window=resized is not None)
        assert_near(crops[number], wanted[:, :, ::-1] if mirrored else wanted)


@pytest.mark.parametrize("num", [1, 10])
def test_crops_are_cut_from_the_resized_picture(resizes, num):
    """As everyone else does it."""
    data = jpeg(scene(500, 375))
    crops = read_crops(data, lambda width, height: evaluation_crops(width, height, num), 224)
    assert resizes == [(341, 256)]
    places = [(58, 16)] if num == 1 else [(0, 0), (117, 0), (0, 32), (117, 32), (58, 16)]
    whole = np.asarray(Image.fromarray(upright(data)).resize((341, 256), Image.Resampling.BILINEAR))
    for number, (left, top) in enumerate(places):
        cut = whole[top : top + 224, left : left + 224].transpose(2, 0, 1).astype(int)
        assert_near(crops[number if num == 1 else 2 * number], cut)
    if num == 10:
        np.testing.assert_array_equal(crops[1::2], crops[::2, :, :, ::-1])


def test_windows_far_apart_are_resized_by_themselves(resizes):
    """Of 4000×100 resized whole, 10,240×256, most would not be seen."""
    data = encode(scene(4000, 100), "PNG")
    crops = read_crops(data, lambda width, height: evaluation_crops(width, height, 10), 224)
    assert resizes == [(224, 224)] * 5
    picture = upright(data)
    for crop, (box, mirrored, _) in zip(crops, evaluation_crops(4000, 100, 10), strict=True):
        wanted = truth(picture, box, 224, window=True)
        assert_near(crop, wanted[:, :, ::-1] if mirrored else wanted)


def test_windows_of_a_reduced_picture(drafts):
    """801×601 halved shows 400.5×300.5 pixels, not 401×301: the far corner must not be displaced."""
    # Waves with ten levels a pixel on their flanks.
    x, y = np.sin(np.arange(801) * (2 * np.pi / 40)), np.sin(np.arange(601) * (2 * np.pi / 40))
    waves = (128 + 60 * (x + y[:, None])).astype(np.uint8)
    data = jpeg(np.stack([waves] * 3, axis=-1))
    crops = read_crops(data, lambda width, height: evaluation_crops(width, height, 10), 224)
    assert drafts == [(401, 301)]
    picture = upright(data)
    for crop, (box, mirrored, _) in zip(crops, evaluation_crops(801, 601, 10), strict=True):
        wanted = truth(picture, box, 224, window=True)
        wanted = wanted[:, :, ::-1] if mirrored else wanted
        assert np.abs(crop - wanted).mean() < 1.0


@pytest.fixture(scope="module")
def photographs(real_data):
    folder = real_data / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip(
            "no photographs on this machine: set BATCHNORM_DATA to a folder that holds imagenet-sample/"
        )
    return [path.read_bytes() for path in sorted(folder.glob("*/*.JPEG"))]


def test_photographs(photographs):
    """Random crops of real pictures, decoded in full and reduced."""
    rng = np.random.default_rng(0)
    off = []
    for data in photographs:
        picture = upright(data)
        height, width, _ = picture.shape
        box = random_area_box(width, height, rng)
        for size in (224, 64):
            got = read_crop(data, lambda *_, box=box: box, size)
            wanted = truth(picture, box, size)
            if min(box.width, box.height) < 2 * size:
                assert_near(got, wanted)
            else:
                off.append(np.abs(got - wanted).mean())
    assert len(off) > 50
    assert np.median(off) < 1.5
    assert max(off) < 8


def test_nothing_of_another_format_is_tried():
    """Pillow would start Ghostscript for one of them."""
    assert {"EPS", "PDF"}.isdisjoint(decode.FORMATS)
