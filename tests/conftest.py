"""Where the models and the scripts are, and how hypothesis behaves."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

# Hundreds of children are started; each would compile an editable package anew.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)

# Interrupts are tested; a shell that starts pytest in the background has them ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The model that this repository trained."""
    return ROOT / "models" / "digits.onnx"


@pytest.fixture(scope="session")
def assets() -> Path:
    """Folder of real models and data outside the repository."""
    folder = Path(os.environ.get("COBLA_ONNX_ASSETS", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no real models at {folder}; set COBLA_ONNX_ASSETS")
    return folder


@pytest.fixture
def tools(monkeypatch):
    """Import a script under tools/ by its name; all of them are forgotten after the test."""
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module
    for script in TOOLS.glob("*.py"):
        sys.modules.pop(script.stem, None)
