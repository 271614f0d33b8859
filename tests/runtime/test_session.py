"""Sessions give the same however their weights come to them."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from cobla_onnx.runtime import session as runtime


def mixed_model():
    """Weights of several types, one of less than a byte, one too small to be handed over."""
    generator = np.random.default_rng(0)
    floats = generator.standard_normal((40, 50)).astype(np.float32)
    halves = generator.standard_normal((50, 60)).astype(np.float16)
    nibbles = helper.make_tensor("nibbles", TensorProto.UINT4, [60, 50], [3] * 3000)
    scale = numpy_helper.from_array(np.float32(0.5), "scale")
    nodes = [
        helper.make_node("MatMul", ["x", "floats"], ["a"]),
        helper.make_node("Cast", ["halves"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["a", "wide"], ["b"]),
        helper.make_node("DequantizeLinear", ["nibbles", "scale"], ["c"]),
        helper.make_node("MatMul", ["b", "c"], ["d"]),
        helper.make_node("MatMul", ["d", "outside"], ["y"]),
    ]
    stored = [numpy_helper.from_array(floats, "floats"), numpy_helper.from_array(halves, "halves")]
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 40])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [*stored, nibbles, scale],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("by_file_from", [1, 1 << 40])
@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
def test_types_of_less_than_a_byte_are_read_as_they_are(monkeypatch, kind, by_file_from):
    monkeypatch.setattr(runtime, "BY_FILE", by_file_from)
    values = np.random.default_rng(3).integers(0, 8, (61, 51))
    node = helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)
    graph = helper.make_graph(
        [node],
        "packed",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("q", kind, [61, 51], values.ravel().tolist())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = runtime.run_session(runtime.open_session(model, 1), {})
    np.testing.assert_array_equal(found["y"], values)


@pytest.mark.skipif(os.name != "posix", reason="mapped files cannot be deleted")
@pytest.mark.parametrize("optimized", [False, True])
def test_weights_in_a_file_are_those_in_memory(monkeypatch, tmp_path, optimized):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outside = {"outside": np.random.default_rng(1).standard_normal((50, 30)).astype(np.float32)}
    feeds = {"x": np.random.default_rng(2).standard_normal((3, 40)).astype(np.float32)}

    def outputs(by_file_from):
        monkeypatch.setattr(runtime, "BY_FILE", by_file_from)
        session = runtime.open_session(mixed_model(), 1, ["a"], outside, optimized=optimized)
        # The file is gone as soon as the session has it.
        assert list(tmp_path.iterdir()) == []
        return runtime.run_session(session, feeds)

    made = []
    inner = runtime.temporary_folder
    monkeypatch.setattr(
        runtime, "temporary_folder", lambda purpose: made.append(purpose) or inner(purpose)
    )
    in_memory = outputs(1 << 40)
    assert made == []
    in_file = outputs(0)
    assert len(made) == runtime.MAPS_FILES
    for name, expected in in_memory.items():
        np.testing.assert_array_equal(in_file[name], expected)


def test_timed_sessions_have_their_weights_in_memory(monkeypatch):
    monkeypatch.setattr(runtime, "BY_FILE", 0)
    monkeypatch.delattr(runtime, "temporary_folder")
    outside = {"outside": np.ones((50, 30), np.float32)}
    assert runtime.open_session(mixed_model(), 1, (), outside, timed=True)


def test_a_weight_that_is_also_an_output_is_handed_over():
    weight = np.arange(1024, dtype=np.float32).reshape(32, 32)
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        kept (float[N, 32] x) => (float[N, 32] y) { y = Relu(x) }""")
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    session = runtime.open_session(model, 1, ["w"])
    found = runtime.run_session(session, {"x": np.zeros((1, 32), np.float32)})
    np.testing.assert_array_equal(found["w"], weight)


@pytest.mark.parametrize("given_back", [False, True])
def test_a_session_of_many_weights_opens_in_memory_that_is_not_in_use(monkeypatch, given_back):
    text = "<ir_version: 8, opset_import: ['': 17]> g (float[N, 32] x) => (float[N, 32] y) {"
    model = parser.parse_model(text.replace("'", '"') + "y = MatMul(x, w)}")
    weight = np.ones((32, 32), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    returned: list[bool] = []
    large: list[bool] = []
    monkeypatch.setattr(runtime, "return_freed_memory", lambda: returned.append(True))
    monkeypatch.setattr(runtime, "return_large_arrays", lambda: large.append(True))
    monkeypatch.setattr(runtime, "memory_is_given_back", lambda: given_back)
    runtime.open_session(model, 1)
    assert bool(returned) is given_back
    assert not large
    monkeypatch.setattr(runtime, "TRIMMED", weight.nbytes)
    runtime.open_session(model, 1)
    assert len(returned) == 1 + given_back
    assert len(large) == 1


@pytest.mark.parametrize("ir_version", [3, 8])
def test_weights_given_beside_the_model_may_be_read_in_bodies_alone(ir_version):
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["extra"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])],
        )
        for name, op in (("then", "Identity"), ("else", "Neg"))
    }
    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branches["then"], else_branch=branches["else"]
    )
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=ir_version
    )
    extra = np.array([1, 2], np.float32)
    session = runtime.open_session(model, 1, extra_weights={"extra": extra})
    assert [value.name for value in session.get_inputs()] == ["c"]
    (found,) = session.run(None, {"c": np.array(False)})
    assert np.array_equal(found, -extra)
