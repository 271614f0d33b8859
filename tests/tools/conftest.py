"""A small model that the benchmarks of field models find."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.builders import random_array, small_network


@pytest.fixture
def precision(tools, monkeypatch, tmp_path):
    """`benchmark_precision`, with a small model as the only one, and its data in a folder."""
    tool = tools("benchmark_precision")
    monkeypatch.setattr(tool, "NAMES", ("small",))
    monkeypatch.setattr(tool, "FIELD", ("small",))
    monkeypatch.setattr(tool.field, "TASKS", (tool.field.Task("small", "classes"),))
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save(small_network(), folder / "small.onnx")
    for seed, part in enumerate(("calibration", "test")):
        np.savez(folder / f"small_{part}.npz", x=random_array(40, 3, 12, 12, seed=seed))
    return tool
