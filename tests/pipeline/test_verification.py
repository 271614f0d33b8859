"""What the verification may claim: of outputs that vary, are random, are text or say nothing."""

from __future__ import annotations

import io
import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from rich.console import Console

from cobla_onnx import Budget, compress, errors
from cobla_onnx.calibration.evaluation.deviation import rounding_error
from cobla_onnx.calibration.evaluation.outputs import Comparison
from tests.builders import model_of, random_array

NODE = helper.make_node


def batches(count: int, columns: int = 3) -> list[np.ndarray]:
    return [random_array(2, columns, seed=seed) for seed in range(count)]


def test_shapes_that_follow_from_data_are_counted_and_no_failure():
    comparison = Comparison({}, ["y"])
    for number, value in enumerate(batches(4)):
        comparison.add({"y": value}, {"y": value[:1] if number == 2 else value}, {}, 2)
    (found,) = comparison.results()
    assert found.relative_l2 == 0
    assert "'y': could not be compared on 1 of 4 batches" in comparison.notes()[0]


@pytest.mark.parametrize(
    ("varying", "after"),
    [
        ([], np.zeros((1, 3), np.float32)),
        (["y"], np.zeros((2, 3, 1), np.float32)),
        (["y"], np.zeros((2, 3), np.float64)),
        (["y"], [np.zeros((2, 3), np.float64)]),
    ],
    ids=["static shape", "rank", "type", "kind"],
)
def test_other_changes_are_a_failure(varying, after):
    with pytest.raises(errors.VerificationError, match="shape or type changed"):
        Comparison({}, varying).add({"y": np.zeros((2, 3), np.float32)}, {"y": after}, {})


def test_text_sequences_and_maps_are_compared():
    before = {
        "text": np.array(["a", "b", "c", "d"], object),
        "list": [np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)],
        "maps": [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}],
    }
    after = {
        "text": np.array(["a", "b", "c", "x"], object),
        "list": [np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32)],
        "maps": [{"b": 2.0, "a": 1.0}, {"a": 3.0, "b": 4.0}],
    }
    comparison = Comparison({})
    comparison.add(before, after, {}, 4)
    found = {output.name: output for output in comparison.results()}
    assert (found["text"].equal, found["text"].relative_l2) == (0.75, None)
    assert found["list"].relative_l2 == pytest.approx(np.sqrt(0.5))
    assert found["maps"].relative_l2 == 0


@given(st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from(["f2", "f4", "i8"]))
def test_whether_an_output_reacts(count, rows, differs, kind):
    """Over any split into batches: one entry of one sample decides."""
    samples = np.tile(np.array([[0.5, 3.0, 7.0]]), (count * rows + 1, 1))
    if differs:
        samples[-1, 1] += 2.0
    samples = samples.astype(kind)
    comparison = Comparison({})
    for start in range(0, len(samples), rows):
        part = samples[start : start + rows]
        comparison.add({"y": part}, {"y": part}, {}, len(part))
    (found,) = comparison.results()
    assert found.reacts is differs
    assert bool(comparison.notes()) is not differs


def saturated() -> onnx.ModelProto:
    """Ends in a softmax so sharp that all random inputs give the same class with certainty."""
    nodes = [
        NODE("MatMul", ["x", "w1"], ["a"], "fc1"),
        NODE("Relu", ["a"], ["b"], "relu"),
        NODE("Gemm", ["b", "w2", "bias"], ["l"], "fc2"),
        NODE("Softmax", ["l"], ["p"], "softmax", axis=1),
    ]
    bias = np.zeros(8, np.float32)
    bias[3] = 1e4
    weights = {"w1": random_array(16, 16), "w2": random_array(16, 8, seed=1), "bias": bias}
    return model_of(nodes, weights, {"x": ["n", 16]}, ["p"])


def test_outputs_that_do_not_react_prove_nothing_and_every_report_says_so():
    report = compress(saturated(), Budget(mem=0.8)).report
    (output,) = json.loads(json.dumps(report.to_dict()))["verification"]["outputs"]
    assert output["reacts"] is False
    assert any("tells nothing" in note for note in report.verification.notes)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    for text in (console.export_text(), report.to_html(), report.to_markdown()):
        assert "tells nothing" in text
        assert "elative error 0," not in text


def noisy(kind: str) -> onnx.ModelProto:
    drawn = {
        "normal": [
            NODE("RandomNormalLike", ["b"], ["e"], "noise", scale=0.1),
            NODE("Add", ["b", "e"], ["c"], "add"),
        ],
        "dropout": [NODE("Dropout", ["b", "ratio", "train"], ["c"], "noise")],
    }[kind]
    nodes = [
        NODE("MatMul", ["x", "w1"], ["a"], "fc1"),
        NODE("Relu", ["a"], ["b"], "relu"),
        *drawn,
        NODE("MatMul", ["c", "w2"], ["y"], "fc2"),
    ]
    weights = {"w1": random_array(16, 16), "w2": random_array(16, 8, seed=1)}
    if kind == "dropout":
        weights |= {"ratio": np.array(0.5, np.float32), "train": np.array(True)}
    return model_of(nodes, weights, {"x": ["n", 16]}, ["y"])


@pytest.mark.parametrize("kind", ["normal", "dropout"])
def test_a_random_model_is_called_that(kind):
    check = compress(noisy(kind), Budget(mem=0.8)).report.verification
    (note,) = [note for note in check.notes if "random" in note]
    assert "by node 'noise'" in note
    assert check.network_error is None
    assert check.rewrite_max_error < 1e-4


def test_a_wrong_rewrite_of_a_random_model_is_still_found(monkeypatch):
    """Its outputs prove nothing, but each layer is proved alone."""
    from cobla_onnx.pipeline import branches as steps

    right = steps.rewrite

    def wrong(model, replacements):
        made = right(model, replacements)
        name = made.graph.node[0].input[1]
        for tensor in made.graph.initializer:
            if tensor.name == name:
                array = onnx.numpy_helper.to_array(tensor) * np.float32(1.01)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
        return made

    monkeypatch.setattr(steps, "rewrite", wrong)
    with pytest.raises(errors.VerificationError, match="new nodes differ"):
        compress(noisy("normal"), Budget(mem=0.6))


def test_labels_as_integers_are_compared_by_what_is_equal():
    nodes = [
        NODE("MatMul", ["x", "w1"], ["a"], "fc1"),
        NODE("MatMul", ["a", "w2"], ["l"], "fc2"),
        NODE("ArgMax", ["l"], ["y"], "label", axis=1, keepdims=0),
    ]
    weights = {"w1": random_array(16, 16), "w2": random_array(16, 8, seed=1)}
    model = model_of(nodes, weights, {"x": ["n", 16]}, [])
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.INT64, ["n"]))
    (found,) = compress(model, Budget(mem=0.8)).report.verification.outputs
    assert 0 <= found.equal <= 1
    assert found.argmax_agreement is None


def test_texts_are_drawn_and_read_from_data(tmp_path):
    """Texts that the model knows, as input and as output."""
    nodes = [
        NODE(
            "LabelEncoder", ["s"], ["i"], "number", domain="ai.onnx.ml",
            keys_strings=["red", "green"], values_int64s=[0, 1], default_int64=2,
        ),
        NODE("Gather", ["table", "i"], ["x"], "gather"),
        NODE("MatMul", ["x", "w1"], ["a"], "fc1"),
        NODE("MatMul", ["a", "w2"], ["y"], "fc2"),
        NODE("ArgMax", ["y"], ["best"], "best", axis=1, keepdims=0),
        NODE(
            "LabelEncoder", ["best"], ["word"], "word", domain="ai.onnx.ml",
            keys_int64s=list(range(8)), values_strings=list("abcdefgh"), default_string="?",
        ),
    ]  # fmt: skip
    arrays = {
        "table": random_array(3, 16),
        "w1": random_array(16, 16, seed=1),
        "w2": random_array(16, 8, seed=2),
    }
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "words",
        [info("s", TensorProto.STRING, ["n"])],
        [info("y", TensorProto.FLOAT, ["n", 8]), info("word", TensorProto.STRING, ["n"])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    outputs = compress(model, Budget(mem=0.8)).report.verification.outputs
    assert {output.name for output in outputs} == {"y", "word"}
    assert outputs[0].reacts
    for texts in (np.array(["red", "green"] * 10), np.array([b"red", b"green"] * 10)):
        np.savez(tmp_path / "d.npz", s=texts)
        report = compress(model, Budget(mem=0.8), data=tmp_path / "d.npz").report
        assert report.calibration.loss < 1e-3
    np.savez(tmp_path / "o.npz", s=np.array(["red", "green"], object))
    with pytest.raises(errors.DataError, match="dtype str"):
        compress(model, Budget(mem=0.8), data=tmp_path / "o.npz")


def test_an_output_that_numpy_does_not_know_is_named():
    nodes = [
        NODE("MatMul", ["x", "w1"], ["a"], "fc1"),
        NODE("Cast", ["a"], ["y"], "cast", to=TensorProto.BFLOAT16),
    ]
    model = model_of(nodes, {"w1": random_array(16, 16)}, {"x": ["n", 16]}, [])
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.BFLOAT16, ["n", 16]))
    check = compress(model, Budget(mem=0.8)).report.verification
    assert check.outputs == ()
    assert any("'y'" in note and "not compared" in note for note in check.notes)


def test_a_part_that_does_not_load_is_not_blamed_on_the_file():
    from cobla_onnx.runtime.session import open_session

    broken = noisy("normal")
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(errors.PartError, match=r"cut out for the loss.*not at fault") as caught:
        open_session(broken, 1, part="the loss")
    assert caught.value.exit_code == 1
    assert "fc1" in str(caught.value) or "NoSuchOperator" in str(caught.value)


@given(st.integers(0, 100), st.sampled_from(["float16", "float32", "float64"]))
def test_rounding_errors_are_relative_but_to_nothing(seed, dtype):
    values = random_array(3, 4, seed=seed, dtype=dtype)
    moved = values.copy()
    moved[1, 2] += 0.25
    error = rounding_error(values, moved)
    assert error == pytest.approx(0.25 / np.abs(values).max(), rel=0.01)
    assert rounding_error(values * 2, moved * 2) == pytest.approx(error)
    nothing = np.zeros_like(values)
    assert rounding_error(nothing, nothing) == 0
    # In whatever unit an output is.
    assert rounding_error(nothing, nothing + 1e-4) == np.inf
    assert rounding_error(nothing, nothing + np.finfo(dtype).smallest_subnormal) == 0
    endless = np.where(values > 0, np.inf, values)
    assert rounding_error(endless, endless) == 0
    assert rounding_error(values, np.full_like(values, np.nan)) == np.inf
    assert rounding_error(values, values[:2]) == np.inf


def test_outputs_of_subnormal_numbers_are_proved():
    """They have few digits, which differ with the order of the sums."""
    nodes = [NODE("MatMul", ["x", "w1"], ["h"], "fc1"), NODE("MatMul", ["h", "w2"], ["y"], "fc2")]
    weights = {"w1": random_array(32, 24) * np.float32(1e-43), "w2": random_array(24, 16, seed=1)}
    model = model_of(nodes, weights, {"x": ["n", 32]}, ["y"])
    for data in (None, {"x": random_array(40, 32, seed=2)}):
        result = compress(model, Budget(mem=0.5), data=data, threads=1)
        assert result.report.verification.network_error == 0
