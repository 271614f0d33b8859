"""The page in a real browser: it renders, says nothing on the console, and fits a phone."""

from __future__ import annotations

import json
import re
from html import unescape

import pytest

from tests.report.browser import console, find_browser, probe_page, run_browser
from tests.report.reports import full_report, small_report

BACKGROUNDS = {"light": "rgb(250, 249, 246)", "dark": "rgb(20, 24, 26)"}


@pytest.fixture(scope="module")
def pages():
    find_browser()
    return {"small": small_report().to_html(), "full": full_report().to_html()}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["small", "full"])
@pytest.mark.parametrize("width", [400, 1200])
def test_renders_without_errors_and_without_overflow(tmp_path, pages, kind, scheme, width):
    probe = tmp_path / "probe.html"
    probe.write_text(probe_page(pages[kind], width), encoding="utf-8")
    done = run_browser(
        tmp_path / "profile", scheme, "--virtual-time-budget=4000", "--dump-dom", probe.as_uri()
    )
    assert console(done) == []
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stdout[-500:]
    found = json.loads(unescape(match[1]))
    assert found["scroll"] <= found["width"] == width
    assert found["title"].startswith("Compression report")
    assert (found["images"], found["scripts"]) == (0, 0)
    assert found["dark"] == (scheme == "dark")
    assert found["background"] == BACKGROUNDS[scheme]
    assert found["rows"] == (300 if kind == "full" else 3)
    # 300 layers do not make a page that nobody scrolls to the end of.
    assert found["height"] < 6000


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_is_kept(tmp_path, pages, scheme):
    page, picture = tmp_path / "report.html", tmp_path / f"report-{scheme}.png"
    page.write_text(pages["small"], encoding="utf-8")
    done = run_browser(
        tmp_path / "profile", scheme, "--window-size=1100,1800", f"--screenshot={picture}",
        page.as_uri(),
    )  # fmt: skip
    assert console(done) == []
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


@pytest.mark.slow
def test_the_console_is_heard(tmp_path):
    """The tests above can fail: an error on a page is seen."""
    page = tmp_path / "bad.html"
    page.write_text("<script>throw new Error('on purpose')</script>")
    done = run_browser(tmp_path / "profile", "light", "--dump-dom", page.as_uri())
    assert any("on purpose" in line for line in console(done))
