"""Sphinx: the documentation's site, built by scripts/docs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sphinx.application import Sphinx

from cobla_onnx import __version__

COMMANDS = ("compress", "advise", "inspect", "sweep", "compare")

project = "cobla-onnx"
author = "cobla-onnx developers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_generated", "demo"]
nitpicky = False

html_theme = "furo"
html_title = f"cobla-onnx {version}"
html_show_sphinx = False
html_show_copyright = False

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False


def write_help(app: Sphinx) -> None:
    """Write what each command says of its options, for the pages to include."""
    folder = Path(app.srcdir, "_generated")
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "cobla_onnx", command, "--help"],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        text = done.stdout.replace("python -m cobla_onnx", "cobla-onnx")
        (folder / f"{command}.txt").write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Have the help written before the pages are read."""
    app.connect("builder-inited", write_help)
