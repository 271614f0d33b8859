"""Describe the environment of a run: versions, processor, system; no host or user names."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import scipy

import cobla_onnx

__all__ = ["machine", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of what takes part in a compression."""
    return {
        "cobla-onnx": cobla_onnx.__version__,
        "python": platform.python_version(),
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
    }


def machine() -> dict[str, str]:
    """Return ``system``, ``architecture``, ``processor`` and ``cores``."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processor": _processor(),
        "cores": str(os.cpu_count() or 1),
    }


def _processor() -> str:
    """Name of the processor, without starting a process as `platform.processor` does."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return os.environ.get("PROCESSOR_IDENTIFIER", "") or platform.machine()
