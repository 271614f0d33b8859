"""Samples of models as people export them: what a sample is, its shape, and MACs by it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx import Budget, compare, compress
from cobla_onnx.calibration.data.dataset import InputSpec, input_specs
from cobla_onnx.calibration.data.readers import open_data
from cobla_onnx.cli.parsing import input_shapes
from cobla_onnx.errors import DataError, UsageError
from tests.builders import model_of, random_array
from tests.cli.test_command import run


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
        assert report.calibration.calibration_samples == 8
        assert report.budget["mac"].before == 3 * 24 * 32 * 2
    shapes = {"x": (1, 3, 24), "past": (1, 0, 32)}
    report = compress(decoder(), Budget(mac=0.7), input_shapes=shapes, threads=1).report
    assert report.verification.samples > 0


def test_shapes_with_an_empty_axis():
    assert input_shapes("--input-shape", ["a:b:1,2,0,16"]) == {"a:b": (1, 2, 0, 16)}
    for wrong in ("past:1,-2", "past:1,²", "past:"):
        with pytest.raises(UsageError, match="is not NAME:SIZE"):
            input_shapes("--input-shape", [wrong])
    with pytest.raises(UsageError, match="first axis has to be at least 1"):
        compress(decoder(), Budget(mem=0.7), input_shapes={"past": (0, 2, 32)}, threads=1)


def test_missing_inputs_are_all_named():
    with pytest.raises(DataError, match=r"'past' \[\?, \?, 32\]; it has 'x'.*length of 0"):
        compress(decoder(), Budget(mem=0.7), data={"x": random_array(12, 3, 24)}, threads=1)


def convolution(batch: int | str) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "conv"),
        helper.make_node("GlobalAveragePool", ["a"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2"], ["y"], "fc"),
    ]
    weights = {"w1": random_array(16, 3, 3, 3, seed=1), "w2": random_array(16, 12, seed=2)}
    return model_of(nodes, weights, {"x": [batch, 3, 6, 6]}, ["y"])


@pytest.mark.parametrize("batch", [1, 4, "n", "unk__1"])
@pytest.mark.parametrize("kind", ["rows", "stack", "records", "rows without a batch"])
def test_every_batch_takes_samples_of_one_row(batch, kind, tmp_path):
    array = random_array(26, 3, 6, 6)
    data = {
        "rows": {"x": array},
        "stack": {"x": array[:, None]},
        "records": [{"x": row[None]} for row in array],
        "rows without a batch": list(array),
    }[kind]
    path = tmp_path / "m.onnx"
    onnx.save(convolution(batch), path)
    with open_data(data, input_specs(onnx.load(path))) as dataset:
        each = 4 if batch == 4 else 1
        assert (len(dataset), dataset.rows) == (26 // each, each)
        fed = [feeds["x"] for feeds in dataset.batches(range(len(dataset)), 8)]
        if isinstance(batch, int):
            assert {len(x) for x in fed} == {batch}
        np.testing.assert_array_equal(np.concatenate(fed), array[: 26 // each * each])
        left = ("2 rows at the end do not fill a batch of 4",)
        assert dataset.notes == (left if each == 4 else ())
    report = compress(path, Budget(mem=0.8), data=data, threads=1).report
    assert report.calibration.calibration_samples == (12 if batch == 4 else 21)


def test_the_command_takes_a_fixed_batch(tmp_path):
    np.savez(tmp_path / "d.npz", x=random_array(20, 3, 6, 6))
    onnx.save(convolution(1), tmp_path / "m.onnx")
    done = run(tmp_path / "m.onnx", tmp_path / "o.onnx", "--mem", 0.8, "--data", tmp_path / "d.npz")
    assert done.returncode == 0, done.stderr


def test_fixed_and_open_axes_together():
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["p"], "fc"),
        helper.make_node("Add", ["p", "b"], ["y"], "add"),
    ]
    weights = {"w": random_array(24, 16)}
    model = model_of(nodes, weights, {"a": ["n", 24], "b": [1, 16]}, ["y"])
    data = {"a": random_array(10, 24), "b": random_array(10, 16)}
    with open_data(data, input_specs(model)) as dataset:
        assert (len(dataset), dataset.rows) == (10, 1)
        assert {len(feeds["a"]) for feeds in dataset.batches(range(10), 8)} == {1}
    compress(model, Budget(mem=0.8), data=data, threads=1)


def recurrent(*, state: bool) -> onnx.ModelProto:
    """One whose first axis is time, as of many voice models."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "fc"),
        helper.make_node(
            "GRU", ["a", "W", "R", *(["", "", "h"] if state else [])], ["Y"], "gru", hidden_size=8
        ),
        helper.make_node("Squeeze", ["Y", "one"], ["y"], "squeeze"),
    ]
    weights = {
        "w1": random_array(24, 20, seed=1),
        "W": random_array(1, 24, 20, seed=2) / 4,
        "R": random_array(1, 24, 8, seed=3) / 4,
        "one": np.array([1], np.int64),
    }
    inputs: dict[str, list[int | str]] = {"x": ["a", 1, 24]}
    if state:
        inputs["h"] = [1, 1, 8]
    return model_of(nodes, weights, inputs, ["y"], opset=14)


@pytest.mark.parametrize("state", [True, False])
def test_sequences_stay_whole(state):
    model = recurrent(state=state)
    specs = input_specs(model)
    assert {spec.name: spec.first for spec in specs} == (
        {"x": "other", "h": "other"} if state else {"x": "other"}
    )
    x, h = random_array(10, 30, 1, 24), random_array(10, 1, 1, 8)
    sources = [
        {"x": x, "h": h},
        # The batch of one left out, wherever it is; one state for all.
        {"x": x[:, :, 0], "h": h[:, 0]},
        {"x": x, "h": h[0]},
        [{"x": a, "h": b} for a, b in zip(x, h, strict=True)],
    ]
    for source in sources:
        records = [source] if isinstance(source, dict) else source
        if not state:
            for record in records:
                record.pop("h")
        with open_data(source, specs) as dataset:
            assert (len(dataset), dataset.rows) == (10, None)
            fed = [feeds["x"] for feeds in dataset.batches(range(10), 8)]
            np.testing.assert_array_equal(np.stack(fed), x)
    report = compress(model, Budget(mem=0.95), data=sources[0], threads=1).report
    assert report.calibration.calibration_samples == 6
    assert report.calibration.selection_samples == 4
    assert report.verification.samples == 4
    if not state:
        with pytest.raises(DataError, match="give arrays with an axis of samples before it"):
            open_data({"x": x[0]}, specs)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 3), st.none() | st.integers(1, 30))
def test_rows_of_stacks_are_cut_as_rows_are(each, items, rows, samples):
    spec = InputSpec("x", np.dtype(np.float32), (each, 2))
    array = random_array(items, rows, 2)
    flat = array.reshape(-1, 2)
    count = len(flat) // each
    if min(count, samples or count) < 2:
        return
    with (
        open_data({"x": array}, [spec], samples=samples) as stacked,
        open_data({"x": flat}, [spec], samples=samples) as plain,
        open_data(iter(array), [spec], samples=samples) as records,
    ):
        assert len(stacked) == len(plain) == len(records) == min(count, samples or count)
        assert list(stacked.positions) == list(plain.positions)
        for place, index in enumerate(stacked.positions):
            wanted = flat[index * each : (index + 1) * each]
            for dataset in (stacked, plain):
                (feeds,) = dataset.batches([place], 1)
                np.testing.assert_array_equal(feeds["x"], wanted)
        if samples is None:
            (feeds,) = records.batches([count - 1], 1)
            np.testing.assert_array_equal(feeds["x"], flat[(count - 1) * each : count * each])


@pytest.mark.parametrize(
    ("axes", "first"),
    [
        (("batch", "seq"), "batch"),
        (("seq", "batch"), "other"),
        (("time", 1), "other"),
        (("T", "N"), "other"),
        # Frame by frame: rows do not meet.
        (("unk__1", "unk__2"), "batch"),
    ],
)
def test_what_the_first_axis_is(axes, first):
    (spec,) = input_specs(framewise(*axes))
    assert spec.first == first


def test_an_axis_that_nothing_tells_of():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "fc"),
        helper.make_node("Reshape", ["a", "shape"], ["y"], "reshape"),
    ]
    weights = {"w": random_array(24, 16), "shape": np.array([-1, 8], np.int64)}
    model = model_of(nodes, weights, {"x": ["d0", "d1", 24]}, ["y"])
    array = random_array(6, 5, 24)
    with open_data({"x": array}, input_specs(model)) as dataset:
        assert (len(dataset), dataset.rows) == (6, 1)
        assert "'x' was taken for samples; if it is not, put an axis" in dataset.notes[0]
    for source in ({"x": array[:, :, None]}, list(array[:, :, None])):
        with open_data(source, input_specs(model)) as dataset:
            assert (len(dataset), dataset.rows) == (6, None)
            assert "records were kept whole" in dataset.notes[0]


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
    assert report.budget["mac"].before == 5 * 24 * 16


def test_macs_of_samples_of_different_shapes():
    lengths = [3, 9, 5, 5, 8, 5, 9, 4]
    data = [random_array(1, length, 24) for length in lengths]
    report = compress(framewise("batch", "time"), Budget(mac=0.7), data=data, threads=1).report
    assert report.budget["mac"].before == 5 * 24 * 16
    assert any("MACs are of the commonest, x 1x5x24" in note for note in report.notes)
    data = [random_array(1, length, 24) for length in (9, 2, 4, 3, 8)]
    report = compress(framewise("batch", "time"), Budget(mac=0.7), data=data, threads=1).report
    assert report.budget["mac"].before == 4 * 24 * 16
