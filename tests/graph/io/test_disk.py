"""Bytes of a model on disk: what is stated is what is there."""

from __future__ import annotations

import zipfile
from dataclasses import replace

import pytest

from cobla_onnx import Budget, compress
from cobla_onnx.graph.io import disk
from cobla_onnx.graph.io.disk import bytes_of, files_of, zipped_bytes_of
from cobla_onnx.report.costs import Cost
from tests.builders import small_network
from tests.report.test_model import shown


@pytest.mark.parametrize("external", ["always", "never"])
def test_all_files_of_a_model_are_counted(external, tmp_path):
    result = compress(small_network(), Budget(mem=0.7), threads=1)
    result.save(tmp_path / "small.onnx", external_data=external)
    written = set(tmp_path.iterdir())
    assert len(written) == (2 if external == "always" else 1)
    assert files_of(tmp_path / "small.onnx") == written
    sizes = result.report.sizes
    assert sizes.file == Cost(None, sum(path.stat().st_size for path in written))
    # What any zip program makes of them at that level.
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for path in written:
            file.write(path)
        packed = sum(entry.compress_size for entry in file.infolist())
    assert sizes.zipped.after == packed


def test_large_files_are_not_zipped_and_the_report_says_so(tmp_path, monkeypatch):
    result = compress(small_network(), Budget(mem=0.7), threads=1)
    assert result.report.sizes.file == Cost(None, None)
    assert "file:" not in shown(result.report)
    monkeypatch.setattr(disk, "ZIPPED", 100)
    result.save(tmp_path / "small.onnx")
    assert zipped_bytes_of([tmp_path / "small.onnx"]) is None
    assert "zipped not measured" in shown(result.report)
    size = bytes_of([tmp_path / "small.onnx"])
    before = replace(result.report.sizes, file=Cost(2 * size, size))
    page = replace(result.report, sizes=before).to_html()
    assert "zipped not measured" in page
    assert ">50.00 %<" in page
    assert "file, zipped" not in result.report.to_markdown()
