"""Scripts under tools/ as modules, for one test."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch):
    """Import a script by its name; all of them are forgotten after the test."""
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module
    for script in TOOLS.glob("*.py"):
        sys.modules.pop(script.stem, None)
