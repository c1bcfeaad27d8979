"""Charts: the same numbers on the page and in the pictures."""

import errno
import sys

import numpy as np
import pytest
from PIL import Image

from batchnorm import files
from batchnorm.report import Curve, CurveChart, PercentileChart, PercentilePanel, draw, plot
from batchnorm.report.charts import colour

RUNS = np.array([[1.0, 2.0, np.nan], [3.0, 5.0, np.nan], [2.0, 11.0, np.nan]])


def chart(**options) -> CurveChart:
    return CurveChart("title", "steps", "accuracy", [Curve("bn", [1, 10, 100], RUNS)], **options)


def panels() -> PercentileChart:
    values = np.arange(12.0).reshape(4, 3)
    both = [PercentilePanel(name, range(4), (15, 50, 85), values, name) for name in ("plain", "bn")]
    return PercentileChart("title", "steps", "input", both)


SPREADS = {
    "range": ([2, 5, np.nan], [1, 2, np.nan], [3, 11, np.nan]),
    "std": ([2, 6, np.nan], [1, 6 - 21**0.5, np.nan], [3, 6 + 21**0.5, np.nan]),
}


@pytest.mark.parametrize(("spread", "expected"), SPREADS.items(), ids=SPREADS)
def test_middle_and_band_skip_what_no_run_has(spread, expected):
    for line, truth in zip(Curve("bn", [1, 2, 3], RUNS).summary(spread), expected, strict=True):
        np.testing.assert_allclose(line, truth)


def test_a_run_that_ended_early_leaves_the_others():
    runs = [[1.0, 2.0], [3.0, np.nan]]
    middle, low, high = Curve("bn", [1, 2], runs).summary("range")
    np.testing.assert_array_equal([middle, low, high], [[2, 2], [1, 2], [3, 2]])
    middle, low, high = Curve("bn", [1, 2], runs).summary("std")
    np.testing.assert_allclose([middle, low, high], [[2, 2], [2 - 2**0.5, 2], [2 + 2**0.5, 2]])


def test_page_and_picture_show_the_same_lines(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, x, y, *a, **k: (drawn.append((x, y)), original(self, x, y, *a, **k))[1]
    )
    for one in (chart(), panels()):
        drawn.clear()
        lines = [t for t in plot(one)["data"] if t["line"]["width"] > 0]
        draw(one, tmp_path / "p.png")
        assert len(lines) == len(drawn)
        for trace, (x, y) in zip(lines, drawn, strict=True):
            np.testing.assert_array_equal(trace["x"], x)
            np.testing.assert_array_equal(trace["y"], y)


@pytest.mark.parametrize(
    "one", [chart(log_x=True, reference=("paper", 4), y_range=(0, 12)), panels()], ids=["curves", "panels"]
)
def test_pictures_hold_ink_in_their_colours_and_no_pyplot_is_loaded(tmp_path, one):
    had = "matplotlib.pyplot" in sys.modules
    pixels = np.asarray(Image.open(draw(one, tmp_path / "p.png")).convert("RGB")).reshape(-1, 3)
    wanted = np.array([int(colour("bn")[i : i + 2], 16) for i in (1, 3, 5)])
    assert (np.abs(pixels - wanted).max(1) < 12).sum() > 100
    assert ("matplotlib.pyplot" in sys.modules) == had
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_plotly_axes_say_what_was_asked():
    layout = plot(chart(log_x=True, y_range=(0, 1), reference=("paper", 0.5)))["layout"]
    wanted = {"title": {"text": "steps"}, "type": "log", "exponentformat": "power", "dtick": 1}
    assert layout["xaxis"] == wanted
    assert layout["yaxis"]["range"] == [0, 1]
    assert layout["shapes"][0]["y0"] == layout["shapes"][0]["y1"] == 0.5


@pytest.mark.parametrize(
    ("values", "tick"), [([3, 40], "D2"), ([3, 4e4], 1), ([3, 4e9], None), ([np.nan] * 2, "D2")]
)
def test_logarithmic_axes_are_labelled_as_far_as_there_is_room(values, tick):
    axis = plot(CurveChart("", "x", "y", [Curve("a", [1, 2], values)], log_y=True))["layout"]["yaxis"]
    assert axis.get("dtick") == tick


def test_one_run_has_no_band():
    single = CurveChart("", "x", "y", [Curve("a", [1, 2], [3, 4])])
    assert len(plot(single)["data"]) == 1


BAD = {
    "runs of another length": (lambda: Curve("a", [1, 2], [[1, 2, 3]]), r"'a' needs x of shape \(T,\)"),
    "no runs": (lambda: Curve("a", [], []), "not empty"),
    "no curves": (lambda: CurveChart("t", "", "", []), "chart 't' has no curves"),
    "spread": (lambda: chart(spread="iqr"), '"range" or "std", got \'iqr\''),
    "log of zero": (
        lambda: CurveChart("t", "", "", [Curve("a", [0, 1], [1, 2])], log_x=True),
        "leave step 0 out",
    ),
    "panel shape": (lambda: PercentilePanel("p", [1], (15, 85), [[1, 2, 3]]), r"\(T, P\) = \(1, 2\)"),
    "levels": (lambda: PercentilePanel("p", [1], (85, 15), [[1, 2]]), "levels must ascend"),
    "no panels": (lambda: PercentileChart("t", "", "", []), "no panels"),
    "colour": (lambda: colour("red"), "one of bn, plain"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_charts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unwritable_picture_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/p\.png"):
        draw(chart(), tmp_path / "missing" / "p.png")


def test_a_logarithmic_axis_refuses_what_has_no_logarithm_and_says_powers_to_plotly():
    with pytest.raises(ValueError, match="values above zero"):
        CurveChart("", "x", "y", [Curve("a", [1, 2], [0.5, 0.0])], log_y=True)
    positive = CurveChart("", "x", "y", [Curve("a", [1, 2], [0.5, 5])], log_y=True, y_range=(0.1, 100))
    assert plot(positive)["layout"]["yaxis"]["type"] == "log"
    assert plot(positive)["layout"]["yaxis"]["range"] == [-1, 2]


def test_a_full_disk_costs_neither_the_old_picture_nor_leaves_a_part(tmp_path, monkeypatch):
    def fills_up(path, data):
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    old = draw(chart(), tmp_path / "p.png").read_bytes()
    monkeypatch.setattr(files, "_write_synced", fills_up)
    with pytest.raises(OSError, match=r"No space left on device while writing .*p\.png"):
        draw(chart(), tmp_path / "p.png")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("p.png", old)]
