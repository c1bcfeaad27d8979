"""Every Python snippet of the README and the docs runs, in order, one namespace a page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_snippets_run(page, tmp_path, monkeypatch):
    snippets = SNIPPET.findall(page.read_text())
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippet"}
    for snippet in snippets:
        exec(compile(snippet, f"{page.name} snippet", "exec"), namespace)


def test_pages_have_snippets_at_all():
    assert sum(len(SNIPPET.findall(page.read_text())) for page in PAGES) >= 8
