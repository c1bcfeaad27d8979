"""The page as text, and as a browser without a network shows it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from browsing import requests_of

from batchnorm.report import (
    Claim,
    Curve,
    CurveChart,
    Figure,
    Page,
    PercentileChart,
    PercentilePanel,
    Section,
    Table,
    plot,
    write_page,
)


def curves() -> CurveChart:
    steps = np.arange(100, 5001, 100)
    rng = np.random.default_rng(0)
    bn = 0.98 - 0.3 * np.exp(-steps / 300) + rng.normal(0, 0.004, (5, len(steps)))
    plain = 0.97 - 0.8 * np.exp(-steps / 1500) + rng.normal(0, 0.008, (5, len(steps)))
    plain[:, 3] = np.nan
    lines = [Curve("with batch normalization", steps, bn), Curve("without", steps, plain, "plain")]
    return CurveChart("", "training steps", "test accuracy", lines, reference=("the paper", 0.98))


def percentiles() -> PercentileChart:
    steps = np.arange(0, 5000, 50)
    wander = np.cumsum(np.random.default_rng(1).normal(0, 0.1, len(steps)))[:, None]
    width = np.array([-1.0, 0.0, 1.0]) * (1 + steps[:, None] / 2500)
    panels = [
        PercentilePanel("without", steps, (15, 50, 85), wander + width, "plain"),
        PercentilePanel("with batch normalization", steps, (15, 50, 85), wander * 0.05 + np.sign(width)),
    ]
    return PercentileChart("", "training steps", "input of one sigmoid", panels)


def page() -> Page:
    text = "Three hidden layers of 100 sigmoids, trained on binary digits & nothing else.\n\nFive seeds."
    claims = [
        Claim(
            "Trains faster",
            "1 to 14 times fewer steps",
            "9.3 times (8.8 to 9.9)",
            "holds",
            "5 seeds, rate 0.1",
        ),
        Claim("A steadier input", "shown, no figure", "0.07 against 1.9 deviations", "partly"),
        Claim("A larger <final> accuracy", "shown", "+0.1 %", "misses"),
        Claim("Seconds a step", "not given", "0.42 ms"),
    ]
    table = Table(
        "Learning rates", ["rate", "plain", "BN"], [["0.1", 97.11, 97.5], ["0.5", 97.28, 97.62]], "Percent."
    )
    figures = [Figure("Accuracy", "Median, with the range over 5 seeds.", plot(curves()))]
    more = [Figure("One sigmoid's input", "15th, 50th and 85th percentiles.", plot(percentiles()))]
    sections = [
        Section("Training", text, claims, figures, [table]),
        Section("Distributions", "Figure 1 (b, c).", figures=more),
    ]
    footer = {"torch": "2.13.0", "command": "batchnorm reproduce activations --seeds 5"}
    return Page("Activations & <steps>", "Section 4.1, figure 1.", sections, footer)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_page(page(), tmp_path_factory.mktemp("report") / "report.html")


def test_text_is_escaped_and_everything_is_there(written):
    html = written.read_text("utf-8")
    assert "<h1>Activations &amp; &lt;steps&gt;</h1>" in html
    assert "A larger &lt;final&gt; accuracy" in html
    assert "9.3 times (8.8 to 9.9)" in html
    assert html.count('class="verdict holds"') == html.count('class="verdict misses"') == 1
    assert "<p>Five seeds.</p>" in html
    assert '<td class="number">97.62</td>' in html
    assert "<dt>command</dt><dd>batchnorm reproduce activations --seeds 5</dd>" in html


def test_plots_are_json_without_nan_and_plotly_is_there_once(written):
    html = written.read_text("utf-8")
    plots = json.loads(re.search(r'<script type="application/json" id="plots">(.*?)</script>', html, re.S)[1])
    assert len(plots) == 2
    plain = next(trace for trace in plots[0]["data"] if trace.get("name") == "without")
    assert plain["y"][3] is None
    assert plain["x"][:2] == [100, 200]
    assert len(re.findall(r"plotly\.js v\d", html)) == 1
    # Nothing is loaded from elsewhere: no element with a source, and a policy that forbids it.
    ours = html[: html.index("<script>")]
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", ours)
    assert "default-src 'none'" in ours


def test_a_figure_cannot_end_its_script(tmp_path):
    bad = Figure("x", "", {"data": [{"y": [1], "name": "</script ><script >alert(1)//"}]})
    html = write_page(Page("t", "", [Section("s", figures=[bad])]), tmp_path / "r.html").read_text("utf-8")
    start = html.index('id="plots">') + len('id="plots">')
    block = html[start : html.index("</script>", start)]
    assert json.loads(block) == [bad.plot]
    assert "<" not in block


def test_a_page_without_figures_carries_no_plotly(tmp_path):
    path = write_page(Page("t", "", [Section("s", "text")]), tmp_path / "r.html")
    assert path.stat().st_size < 10_000


def test_an_unwritable_path_is_named_and_the_old_page_stays(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot write.*missing/r\.html"):
        write_page(Page("t", "", []), tmp_path / "missing" / "r.html")
    old = tmp_path / "r.html"
    old.write_text("old")
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_page(Page("t", "", [Section("s", figures=[Figure("f", "", {"data": [{"y": object()}]})])]), old)
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_bad_parts_are_refused():
    with pytest.raises(ValueError, match="verdict must be one of 'holds'"):
        Claim("a", "b", "c", "yes")
    with pytest.raises(ValueError, match="table 't': row 1 has 1 cells for 2 columns"):
        Table("t", ["a", "b"], [[1, 2], [1]])
    with pytest.raises(ValueError, match="figure 'f' needs a plotly figure"):
        Figure("f", "", {"layout": {}})


def test_chromium_shows_every_plot_without_error_or_request(browser, written):
    browser.get(written.as_uri())
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => ({"
        " traces: p.querySelectorAll('.scatterlayer .trace').length,"
        " lines: [...p.querySelectorAll('path.js-line')].filter(l => l.getTotalLength() > 100).length,"
        " width: p.querySelector('svg.main-svg').getBoundingClientRect().width }))"
    )
    # Two curves with band edges; two panels of three lines with band edges.
    assert [plot["traces"] for plot in shown] == [6, 10]
    assert all(plot["lines"] >= plot["traces"] // 2 for plot in shown)
    assert all(plot["width"] > 600 for plot in shown)
    assert browser.get_log("browser") == []
    assert requests_of(browser) == [written.as_uri()]


def test_colours_follow_dark_mode(browser, written):
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(written.as_uri())
    expected = {
        "light": ["rgb(255, 255, 255)", "rgb(29, 33, 38)"],
        "dark": ["rgb(20, 23, 27)", "rgb(231, 234, 238)"],
    }
    for mode, colours in expected.items():
        features = [{"name": "prefers-color-scheme", "value": mode}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        WebDriverWait(browser, 10).until(
            lambda browser, colours=colours: (
                colours
                == browser.execute_script(
                    "return [getComputedStyle(document.body).backgroundColor,"
                    " getComputedStyle(document.querySelector('.xtick text')).fill]"
                )
            ),
            f"page and plots did not turn {mode}",
        )
    assert browser.get_log("browser") == []
