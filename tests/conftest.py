"""Where the models are, and how hypothesis behaves."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

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
