"""Samples of models as people export them: what a sample is, its shape, and MACs by it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from cobla_onnx import Budget, compare, compress
from cobla_onnx.cli.parsing import input_shapes
from cobla_onnx.errors import DataError, UsageError
from tests.builders import model_of, random_array
from tests.test_command import run


def decoder() -> onnx.ModelProto:
    """One that reads a past of any length, the empty one too."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "fc1"),
        helper.make_node("Concat", ["past", "a"], ["present"], "join", axis=1),
        helper.make_node("ReduceSum", ["present", "axes"], ["b"], "sum", keepdims=1),
        helper.make_node("Add", ["a", "b"], ["c"], "add"),
        helper.make_node("MatMul", ["c", "w2"], ["y"], "fc2"),
    ]
    weights = {
        "w1": random_array(24, 32, seed=1),
        "w2": random_array(32, 24, seed=2),
        "axes": np.array([1], np.int64),
    }
    inputs = {"x": ["batch", "seq", 24], "past": ["batch", "past", 32]}
    return model_of(nodes, weights, inputs, ["y"])


def test_an_empty_past_is_a_feed(tmp_path):
    data = {"x": random_array(12, 3, 24), "past": np.zeros((12, 0, 32), np.float32)}
    np.savez(tmp_path / "first.npz", **data)
    for source in (data, tmp_path / "first.npz"):
        report = compress(decoder(), Budget(mem=0.7, mac=0.7), data=source, threads=1).report
        assert report.calibration.calibration_samples == 10
        assert report.mac.before == 3 * 24 * 32 * 2
    shapes = {"x": (1, 3, 24), "past": (1, 0, 32)}
    report = compress(decoder(), Budget(mac=0.7), input_shapes=shapes, threads=1).report
    assert report.verification.samples > 0


def test_shapes_with_an_empty_axis():
    assert input_shapes(["a:b:1,2,0,16"]) == {"a:b": (1, 2, 0, 16)}
    for wrong in ("past:1,-2", "past:1,²", "past:"):
        with pytest.raises(UsageError, match="is not NAME:SIZE"):
            input_shapes([wrong])
    with pytest.raises(UsageError, match="first axis has to be at least 1"):
        compress(decoder(), Budget(mem=0.7), input_shapes={"past": (0, 2, 32)}, threads=1)


def test_missing_inputs_are_all_named():
    with pytest.raises(DataError, match=r"'past' \[\?, \?, 32\]; it has 'x'.*length of 0"):
        compress(decoder(), Budget(mem=0.7), data={"x": random_array(12, 3, 24)}, threads=1)


def framewise(*axes: str | int) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")]
    return model_of(nodes, {"w": random_array(24, 16)}, {"x": [*axes, 24]}, ["y"])


def test_macs_are_counted_by_the_shapes_of_the_data(tmp_path):
    np.savez(tmp_path / "d.npz", x=random_array(20, 7, 24))
    onnx.save(framewise("batch", "time"), tmp_path / "m.onnx")
    out = tmp_path / "out.onnx"
    done = run(tmp_path / "m.onnx", out, "--mac", 0.7, "--data", tmp_path / "d.npz")
    assert done.returncode == 0, done.stderr
    found = compare(tmp_path / "m.onnx", out, data=tmp_path / "d.npz", threads=1)
    assert found.first.macs == 7 * 24 * 16
    report = compress(
        tmp_path / "m.onnx",
        Budget(mac=0.7),
        data=tmp_path / "d.npz",
        input_shapes={"x": (1, 5, 24)},
        threads=1,
    ).report
    assert report.mac.before == 5 * 24 * 16


def test_macs_of_samples_of_different_shapes():
    lengths = [3, 9, 5, 5, 8, 5, 9, 4]
    data = [random_array(1, length, 24) for length in lengths]
    report = compress(framewise("batch", "time"), Budget(mac=0.7), data=data, threads=1).report
    assert report.mac.before == 5 * 24 * 16
    assert any("MACs are of the commonest, x 1x5x24" in note for note in report.notes)
    data = [random_array(1, length, 24) for length in (9, 2, 4, 3, 8)]
    report = compress(framewise("batch", "time"), Budget(mac=0.7), data=data, threads=1).report
    assert report.mac.before == 4 * 24 * 16
