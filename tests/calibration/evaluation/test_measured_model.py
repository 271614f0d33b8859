"""Where the loss is taken, on models whose outputs cannot be compared as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cobla_onnx import Budget, compress, errors
from cobla_onnx.calibration.evaluation.measured_model import measured_model
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import random_array

NODE = helper.make_node
INFO = helper.make_tensor_value_info
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def typed(nodes, weights, outputs, inputs=None, domains=()) -> onnx.ModelProto:
    """Return a model whose outputs are given with type and shape."""
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    inputs = inputs or [INFO("x", FLOAT, ["n", 16])]
    graph = helper.make_graph(nodes, "test", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(*d) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def body() -> list[onnx.NodeProto]:
    return [
        NODE("Gemm", ["x", "w1"], ["a"], "fc1"),
        NODE("Relu", ["a"], ["b"], "relu"),
        NODE("Gemm", ["b", "w2"], ["l"], "fc2"),
    ]


def weights(outputs: int = 8) -> dict[str, np.ndarray]:
    """A first layer worth cutting: its singular values fall."""
    left, right = random_array(16, 16, seed=1), random_array(16, 16, seed=2)
    falling = (left * 0.7 ** np.arange(16)) @ right / 16
    return {"w1": falling.astype(np.float32), "w2": random_array(16, outputs, seed=3) / 4}


def samples(count: int = 40) -> np.ndarray:
    return random_array(count, 16, seed=4)


def measure(model: onnx.ModelProto, data: np.ndarray | None = None, **options):
    data = samples() if data is None else data
    examples = [{model.graph.input[0].name: data[i : i + 1]} for i in range(6)]
    return measured_model(model, find_layers(model).layers, examples, **options)


def detector() -> onnx.ModelProto:
    """Boxes and scores of ten places, of which NonMaxSuppression keeps as many as it likes."""
    nodes = [
        NODE("Gemm", ["x", "w1"], ["a"], "fc1"),
        NODE("Relu", ["a"], ["b"], "relu"),
        NODE("Gemm", ["b", "wb"], ["flat boxes"], "boxes"),
        NODE("Reshape", ["flat boxes", "box shape"], ["boxes"], "rb"),
        NODE("Gemm", ["b", "ws"], ["flat scores"], "scores"),
        NODE("Sigmoid", ["flat scores"], ["probable"], "sigmoid"),
        NODE("Reshape", ["probable", "score shape"], ["scores"], "rs"),
        NODE("NonMaxSuppression", ["boxes", "scores", "most", "overlap", "least"], ["kept"], "nms"),
        NODE("Gather", ["kept", "two"], ["which"], "which", axis=1),
        NODE("Squeeze", ["boxes", "zero"], ["list"], "list"),
        NODE("Gather", ["list", "which"], ["found"], "found"),
    ]
    first = weights()["w1"]
    constants = {
        "w1": first,
        "wb": random_array(16, 40, seed=5),
        "ws": random_array(16, 10, seed=6),
        "box shape": np.array([1, 10, 4]),
        "score shape": np.array([1, 1, 10]),
        "most": np.array([10]),
        "overlap": np.array([0.5], np.float32),
        "least": np.array([0.6], np.float32),
        "two": np.array(2),
        "zero": np.array([0]),
    }
    outputs = [INFO("found", FLOAT, ["m", 4]), INFO("kept", INT64, ["m", 3])]
    return typed(nodes, constants, outputs, [INFO("x", FLOAT, [1, 16])])


def test_selected_boxes_are_measured_before_the_selection():
    found = measure(detector())
    assert set(found.outputs) == {"list", "scores"}
    assert [value.name for value in found.model.graph.output] == list(found.outputs)
    assert "'found'" in found.notes[0]
    assert "node 'nms', NonMaxSuppression" in found.notes[0]
    assert found.unmeasured == ()


def test_what_comes_behind_is_not_run():
    """Nodes stay at their places, where layers know them, but those without use cost nothing."""
    model = detector()
    measured = measure(model).model
    kinds = [node.op_type for node in measured.graph.node]
    assert len(kinds) == len(model.graph.node)
    assert "NonMaxSuppression" not in kinds
    feeds = {"x": samples(1)}
    expected = run_session(open_session(model, 1, ["list", "scores"]), feeds)
    actual = run_session(open_session(measured, 1), feeds)
    assert all(np.array_equal(actual[name], expected[name]) for name in ("list", "scores"))


def test_a_detector_is_compressed_with_data():
    result = compress(detector(), Budget(mem=0.8), data={"x": samples()}, batch=1)
    report = result.report
    assert set(report.calibration.outputs) == {"list", "scores"}
    assert any("the loss is taken at" in note for note in report.notes)
    assert {output.name for output in report.verification.outputs} <= {"found", "kept"}


def test_a_label_alone_is_measured_by_its_scores():
    nodes = [*body(), NODE("ArgMax", ["l"], ["y"], "label", axis=1, keepdims=0)]
    model = typed(nodes, weights(), [INFO("y", INT64, ["n"])])
    found = measure(model)
    assert found.outputs == {"l": "y"}
    assert found.shown("l") == "y"
    result = compress(model, Budget(mem=0.8), data={"x": samples()})
    assert result.report.calibration.outputs.keys() == {"y"}
    assert result.report.calibration.loss < 0.1


@pytest.mark.parametrize("after", ["Cast", "Round"])
def test_labels_written_as_floats_are_no_measure(after):
    if after == "Cast":
        tail = [
            NODE("ArgMax", ["l"], ["label"], "label", axis=1),
            NODE("Cast", ["label"], ["y"], "cast", to=FLOAT),
        ]
    else:
        tail = [NODE("Sigmoid", ["l"], ["s"], "s"), NODE("Round", ["s"], ["y"], "round")]
    model = typed([*body(), *tail], weights(), [INFO("y", FLOAT, ["n", None])])
    assert measure(model).outputs == {"l" if after == "Cast" else "s": "y"}


def test_probabilities_count_and_their_label_adds_nothing():
    nodes = [
        *body(),
        NODE("ArgMax", ["l"], ["label"], "label", axis=1, keepdims=0),
        NODE("Softmax", ["l"], ["p"], "softmax", axis=1),
    ]
    model = typed(nodes, weights(), [INFO("label", INT64, ["n"]), INFO("p", FLOAT, ["n", 8])])
    assert measure(model).outputs == {"p": "p"}


def test_a_list_of_dicts_is_measured_by_what_it_is_made_of():
    kind = helper.make_map_type_proto(INT64, helper.make_tensor_type_proto(FLOAT, None))
    nodes = [
        *body(),
        NODE("ArgMax", ["l"], ["label"], "label", axis=1, keepdims=0),
        NODE("Softmax", ["l"], ["p"], "softmax", axis=1),
        NODE(
            "ZipMap", ["p"], ["named"], "named", domain="ai.onnx.ml",
            classlabels_int64s=list(range(8)),
        ),
    ]  # fmt: skip
    named = helper.make_value_info("named", helper.make_sequence_type_proto(kind))
    model = typed(nodes, weights(), [INFO("label", INT64, ["n"]), named], None, [("ai.onnx.ml", 2)])
    assert measure(model).outputs == {"p": "named"}
    result = compress(model, Budget(mem=0.8), data={"x": samples()})
    assert result.report.calibration.outputs.keys() == {"named"}


def test_a_weight_that_is_an_output_does_not_count():
    model = typed(body(), weights(), [INFO("l", FLOAT, ["n", 8]), INFO("w1", FLOAT, [16, 16])])
    found = measure(model)
    assert found.outputs == {"l": "l"}
    assert "'w1'" in found.notes[0]
    with_data = compress(model, Budget(mem=0.98), data={"x": samples()})
    assert [layer.name for layer in with_data.report.layers if layer.decision == "factorised"]


def test_an_output_without_a_type_gets_one():
    model = typed(body(), weights(), [onnx.ValueInfoProto(name="l")])
    found = measure(model)
    assert found.model.graph.output[0].type.tensor_type.elem_type == FLOAT
    assert not model.graph.output[0].HasField("type")
    assert compress(model, Budget(mem=0.8), data={"x": samples()}).report.calibration.loss < 0.1


def test_ordinary_outputs_need_no_copy():
    model = typed(body(), weights(), [INFO("l", FLOAT, ["n", 8])])
    found = measure(model)
    assert found.model is model
    assert found.notes == ()


def test_ignored_outputs_are_left_out_and_one_must_be_left():
    model = typed(body(), weights(), [INFO("l", FLOAT, ["n", 8]), INFO("b", FLOAT, ["n", 16])])
    assert measure(model, ignored={"b"}).outputs == {"l": "l"}
    with pytest.raises(errors.DataError, match=r"'b', 'l' left out.*data="):
        measure(model, ignored={"b", "l"})


def test_sizes_that_are_computed_count_where_samples_show_it():
    """The k of a TopK is read from data: of one model it changes, of the other never does."""
    for changes in (True, False):
        nodes = [
            *body(),
            NODE("ReduceMax", ["x"], ["top"], "top", keepdims=0),
            NODE("Mul", ["top", "scale"], ["scaled"], "scaled"),
            NODE("Clip", ["scaled", "low", "high"], ["clipped"], "clip"),
            NODE("Cast", ["clipped"], ["whole"], "whole", to=INT64),
            NODE("Reshape", ["whole", "one"], ["k"], "k"),
            NODE("TopK", ["l", "k"], ["y", "where"], "topk"),
        ]
        constants = {
            **weights(),
            "scale": np.array(2, np.float32),
            "low": np.array(1 if changes else 5, np.float32),
            "high": np.array(8 if changes else 5, np.float32),
            "one": np.array([1]),
        }
        model = typed(nodes, constants, [INFO("y", FLOAT, ["n", "k"])])
        assert measure(model).outputs == ({"l": "y"} if changes else {"y": "y"})


def test_layers_that_no_measured_tensor_sees_are_left_whole():
    """A second stage on what the first has selected: its loss cannot be told."""
    nodes = [
        *body(),
        NODE("ReduceMean", ["l"], ["score"], "score", axes=[1], keepdims=0),
        NODE("Greater", ["score", "zero"], ["good"], "good"),
        NODE("Compress", ["l", "good"], ["chosen"], "choose", axis=0),
        NODE("Gemm", ["chosen", "w3"], ["y"], "second"),
    ]
    constants = {
        **weights(16), "zero": np.array(0, np.float32), "w3": random_array(16, 16, seed=7),
    }  # fmt: skip
    model = typed(nodes, constants, [INFO("y", FLOAT, ["m", 16])])
    found = measure(model)
    assert (found.outputs, found.unmeasured) == ({"l": "y"}, ("second",))
    report = compress(model, Budget(mem=0.9), data={"x": samples()}).report
    (layer,) = [layer for layer in report.layers if layer.name == "second"]
    assert layer.decision == "skipped"
    assert "loss" in layer.reason
