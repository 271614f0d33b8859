"""A headless Chromium as a plain process: the page's DOM, its console, a picture."""

from __future__ import annotations

import os
import shutil
import subprocess
from html import escape
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
)  # fmt: skip
# What Chromium calls the two values of prefers-color-scheme in its settings.
SCHEMES = {"dark": "0", "light": "1"}
PROBE = """<!doctype html><title>probe</title>
<iframe id="page" style="width:{width}px;height:2000px;border:0" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
document.getElementById("page").onload = function () {{
  const page = this.contentDocument, root = page.documentElement;
  document.getElementById("found").textContent = JSON.stringify({{
    width: root.clientWidth, scroll: root.scrollWidth, title: page.title,
    images: page.images.length, scripts: page.scripts.length,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: this.contentWindow.getComputedStyle(page.body).backgroundColor,
    rows: page.querySelectorAll("table.layers tbody tr").length,
    height: root.scrollHeight,
  }});
}};
</script>"""


def find_browser() -> str:
    """Return the browser's path, or skip the test."""
    for name in NAMES:
        found = shutil.which(name)
        if found:
            return found
    pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")


def run_browser(profile: Path, scheme: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return subprocess.run(
        [
            find_browser(),
            *OPTIONS,
            *root,
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            *arguments,
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        check=True,
    )


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what pages wrote to the console, errors of their loading included."""
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def probe_page(page: str, width: int) -> str:
    """Return a page that holds another in a frame of a width, and writes down what it sees."""
    return PROBE.format(width=width, page=escape(page, quote=True))
