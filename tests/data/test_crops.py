"""Boxes against lists derived by hand, and the law that random boxes are drawn from."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from batchnorm.data.crops import Box, Crop, evaluation_crops, random_area_box

# By hand: a line for each scale and square, with the resized image's size; then left,top of the four
# corners and the centre, of 224 pixels; the last is left,top of the square, whose side is the scale.

LANDSCAPE = """
341×256:    0,0   32,0    0,32   32,32   16,16    0,0
341×256:   42,0   74,0   42,32   74,32   58,16   42,0
341×256:   85,0  117,0   85,32  117,32  101,16   85,0
384×288:    0,0   64,0    0,64   64,64   32,32    0,0
384×288:   48,0  112,0   48,64  112,64   80,32   48,0
384×288:   96,0  160,0   96,64  160,64  128,32   96,0
427×320:    0,0   96,0    0,96   96,96   48,48    0,0
427×320:   53,0  149,0   53,96  149,96  101,48   53,0
427×320:  107,0  203,0  107,96  203,96  155,48  107,0
469×352:    0,0  128,0   0,128 128,128   64,64    0,0
469×352:   58,0  186,0  58,128 186,128  122,64   58,0
469×352:  117,0  245,0 117,128 245,128  181,64  117,0
"""

PORTRAIT = """
256×384:    0,0   32,0    0,32   32,32   16,16    0,0
256×384:   0,64  32,64    0,96   32,96   16,80   0,64
256×384:  0,128 32,128   0,160  32,160  16,144  0,128
288×432:    0,0   64,0    0,64   64,64   32,32    0,0
288×432:   0,72  64,72   0,136  64,136  32,104   0,72
288×432:  0,144 64,144   0,208  64,208  32,176  0,144
320×480:    0,0   96,0    0,96   96,96   48,48    0,0
320×480:   0,80  96,80   0,176  96,176  48,128   0,80
320×480:  0,160 96,160   0,256  96,256  48,208  0,160
352×528:    0,0  128,0   0,128 128,128   64,64    0,0
352×528:   0,88 128,88   0,216 128,216  64,152   0,88
352×528:  0,176 128,176  0,304 128,304  64,240  0,176
"""

SQUARE = """
256×256:    0,0   32,0    0,32   32,32   16,16    0,0
256×256:    0,0   32,0    0,32   32,32   16,16    0,0
256×256:    0,0   32,0    0,32   32,32   16,16    0,0
288×288:    0,0   64,0    0,64   64,64   32,32    0,0
288×288:    0,0   64,0    0,64   64,64   32,32    0,0
288×288:    0,0   64,0    0,64   64,64   32,32    0,0
320×320:    0,0   96,0    0,96   96,96   48,48    0,0
320×320:    0,0   96,0    0,96   96,96   48,48    0,0
320×320:    0,0   96,0    0,96   96,96   48,48    0,0
352×352:    0,0  128,0   0,128 128,128   64,64    0,0
352×352:    0,0  128,0   0,128 128,128   64,64    0,0
352×352:    0,0  128,0   0,128 128,128   64,64    0,0
"""


def expected(table, width, height):
    crops = []
    for line in table.strip().splitlines():
        resized, places = line.split(":")
        resized_width, resized_height = map(int, resized.split("×"))
        *cut, whole = (tuple(map(int, place.split(","))) for place in places.split())
        x, y = width / resized_width, height / resized_height
        for left, top in cut:
            box = Box(left * x, top * y, 224 * x, 224 * y)
            crops += [Crop(box, mirrored, (resized_width, resized_height)) for mirrored in (False, True)]
        side = min(resized_width, resized_height)
        box = Box(whole[0] * x, whole[1] * y, side * x, side * y)
        crops += [Crop(box, mirrored) for mirrored in (False, True)]
    return crops


def assert_same(got, wanted):
    assert [crop[1:] for crop in got] == [crop[1:] for crop in wanted]
    np.testing.assert_allclose([crop.box for crop in got], [crop.box for crop in wanted], rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("width", "height", "table"),
    [
        pytest.param(500, 375, LANDSCAPE, id="landscape, sides rounded"),
        pytest.param(300, 450, PORTRAIT, id="portrait"),
        pytest.param(300, 300, SQUARE, id="square, its three squares coincide"),
    ],
)
def test_144_crops_are_those_derived_by_hand(width, height, table):
    wanted = expected(table, width, height)
    assert len(wanted) == 144
    assert_same(evaluation_crops(width, height, 144), wanted)


def test_squares_of_a_landscape_show_all_of_its_height():
    whole = evaluation_crops(500, 375, 144)[10]
    assert whole == Crop(Box(0.0, 0.0, pytest.approx(256 * 500 / 341), 375.0), False)


def test_ten_crops_are_corners_and_centre_of_the_whole_image():
    # 512×384 becomes 341×256, with 117 and 32 pixels to spare.
    places = [(0, 0), (117, 0), (0, 32), (117, 32), (58, 16)]
    x, y = 512 / 341, 384 / 256
    wanted = [
        Crop(Box(left * x, top * y, 224 * x, 224 * y), mirrored, (341, 256))
        for left, top in places
        for mirrored in (False, True)
    ]
    assert_same(evaluation_crops(512, 384, 10), wanted)


@pytest.mark.parametrize(
    ("width", "height", "size", "box"),
    [
        pytest.param(512, 256, 224, (144.0, 16.0, 224.0, 224.0), id="nothing to resize"),
        pytest.param(1024, 512, 224, (288.0, 32.0, 448.0, 448.0), id="halved"),
        pytest.param(257, 256, 224, (16.0, 16.0, 224.0, 224.0), id="odd margin, smaller half left"),
        pytest.param(1, 1, 224, (1 / 16, 1 / 16, 7 / 8, 7 / 8), id="one pixel"),
        # 1×2400 becomes 256×614,400, whose middle 224 rows are 0.875 of a pixel.
        pytest.param(1, 2400, 224, (1 / 16, 1199.5625, 7 / 8, 7 / 8), id="a line of 2400 pixels"),
        # 32·256/224 = 36.57, so the shorter side is 37 and the margins 2 and 3.
        pytest.param(32, 32, 32, (2 * 32 / 37, 2 * 32 / 37, 32 * 32 / 37, 32 * 32 / 37), id="32 pixels"),
        # 299·256/224 = 341.71; 342/2 is whole: 171 for 1000.
        pytest.param(
            1000, 1000, 299, (21 * 1000 / 342, 21 * 1000 / 342, 299000 / 342, 299000 / 342), id="299"
        ),
        pytest.param(5, 5, 1, (0.0, 0.0, 5.0, 5.0), id="crops of one pixel"),
    ],
)
def test_the_centre(width, height, size, box):
    (crop,) = evaluation_crops(width, height, 1, size)
    assert not crop.mirrored
    np.testing.assert_allclose(crop.box, box, rtol=1e-13)


def test_scales_for_cifar():
    """37, 41, 46 and 50 pixels for the four scales: 36.57, 41.14, 45.71 and 50.29."""
    crops = evaluation_crops(32, 32, 144, 32)
    sides = [32 * 32 / crop.box.width for crop in crops[::36]]
    np.testing.assert_allclose(sides, [37, 41, 46, 50], rtol=1e-13)
    assert crops[10].box == Box(0.0, 0.0, 32.0, 32.0)


@given(
    width=st.integers(1, 2400),
    height=st.integers(1, 2400),
    size=st.sampled_from([1, 31, 32, 224, 299]),
    num=st.sampled_from([1, 10, 144]),
)
def test_every_crop_lies_in_its_image(width, height, size, num):
    crops = evaluation_crops(width, height, num, size)
    assert len(crops) == num
    for left, top, across, down in (crop.box for crop in crops):
        assert left >= 0
        assert top >= 0
        assert across > 0
        assert down > 0
        assert left + across <= width + 1e-9
        assert top + down <= height + 1e-9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param((0, 5), "at least 1×1 pixels, got 0×5", id="no width"),
        pytest.param((5, 0, 144), "at least 1×1 pixels, got 5×0", id="no height"),
        pytest.param((5, 5, 2), "1, 10 or 144 crops, got 2", id="another number"),
        pytest.param((5, 5, 1, 0), "at least 1 pixel, got 0", id="no size"),
    ],
)
def test_evaluation_crops_refuse(arguments, says):
    with pytest.raises(ValueError, match=says):
        evaluation_crops(*arguments)


class Scripted:
    """A generator whose draws are known."""

    def __init__(self, uniform, integers):
        self.draws, self.places, self.asked = list(uniform), list(integers), []

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.draws.pop(0)

    def integers(self, high):
        self.asked.append(high)
        return self.places.pop(0)


def test_a_random_box_by_hand():
    """A quarter of 1000×600 is 150,000 pixels: at a ratio of 1.5, 474.3×316.2."""
    rng = Scripted([0.25, math.log(1.5)], [17, 4])
    assert random_area_box(1000, 600, rng) == Box(17, 4, 474, 316)
    areas, ratios = (0.08, 1.0), (math.log(3 / 4), math.log(4 / 3))
    assert rng.asked == [areas, ratios, 1000 - 474 + 1, 600 - 316 + 1]


def test_a_box_that_does_not_fit_is_drawn_again():
    """All of 1000×600 as a square is 774.6 high; half of it 547.7."""
    rng = Scripted([1.0, 0.0, 0.5, 0.0], [0, 52])
    assert random_area_box(1000, 600, rng) == Box(0, 52, 548, 548)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        # The smallest box of an allowed ratio, 19,200 pixels, is 120 high or more.
        pytest.param(2400, 100, (1133, 0, 133, 100), id="too wide"),
        pytest.param(100, 2400, (0, 1133, 100, 133), id="too high"),
        pytest.param(2400, 1, (1199, 0, 1, 1), id="a line"),
    ],
)
def test_where_no_box_fits_it_is_the_largest_centred_one(width, height, box):
    for seed in range(20):
        assert random_area_box(width, height, np.random.default_rng(seed)) == Box(*box)


def test_of_one_pixel_there_is_one_box():
    assert {random_area_box(1, 1, np.random.default_rng(seed)) for seed in range(50)} == {Box(0, 0, 1, 1)}


def test_areas_ratios_and_places_follow_their_law():
    rng = np.random.default_rng(0)
    # Every box of up to half the area fits, so that the law is not bent by those that do not.
    boxes = np.array([random_area_box(2000, 2000, rng, area=(0.08, 0.5)) for _ in range(4000)])
    left, top, width, height = boxes.T
    share = (width * height / 2000**2 - 0.08) / 0.42
    ratio = np.log(width / height) / (2 * math.log(4 / 3)) + 0.5
    for values in (share, ratio, (left + 0.5) / (2001 - width), (top + 0.5) / (2001 - height)):
        assert kstest(values, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(np.stack([share, ratio, left, top]))[0, 1]) < 0.05


def test_bounds_of_area_and_ratio_are_obeyed():
    rng = np.random.default_rng(1)
    for _ in range(500):
        _, _, width, height = random_area_box(800, 600, rng, area=(0.2, 0.3), aspect=(0.5, 0.6))
        assert 0.2 - 0.002 < width * height / 480_000 < 0.3 + 0.002
        assert 0.5 - 0.002 < width / height < 0.6 + 0.002


@given(width=st.integers(1, 2400), height=st.integers(1, 2400), seed=st.integers(0, 99))
def test_a_random_box_lies_in_its_image_and_repeats(width, height, seed):
    box = random_area_box(width, height, np.random.default_rng(seed))
    assert all(isinstance(side, int) for side in box)
    assert 0 <= box.left < box.left + box.width <= width
    assert 0 <= box.top < box.top + box.height <= height
    assert random_area_box(width, height, np.random.default_rng(seed)) == box


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param({"area": (0.0, 1.0)}, "area must be", id="no area"),
        pytest.param({"area": (0.5, 0.4)}, "area must be", id="areas in the wrong order"),
        pytest.param({"area": (0.5, 1.1)}, "area must be", id="more than everything"),
        pytest.param({"aspect": (0.0, 1.0)}, "aspect must be", id="no width"),
        pytest.param({"aspect": (2.0, 1.0)}, "aspect must be", id="ratios in the wrong order"),
        pytest.param({"area": (math.nan, 1.0)}, "area must be", id="no number"),
    ],
)
def test_bounds_that_no_box_can_meet(change, says):
    with pytest.raises(ValueError, match=says):
        random_area_box(10, 10, np.random.default_rng(0), **change)


def test_an_image_without_pixels_has_no_box():
    with pytest.raises(ValueError, match="got 0×3"):
        random_area_box(0, 3, np.random.default_rng(0))
