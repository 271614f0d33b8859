"""Describe the environment of a run: versions, processor, system; no host or user names."""

from __future__ import annotations

import os
import platform

import numpy as np
import onnx
import onnxruntime
import scipy

import cobla_onnx
from cobla_onnx.runtime.machine import processor

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
        "processor": processor() or platform.machine(),
        "cores": str(os.cpu_count() or 1),
    }
