"""Adjoints of linear maps along an axis: <A x, dy> = <x, A' dy>."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.vjp.selection import adjoint_of_matrix, adjoint_of_take


def written(write, dy: np.ndarray) -> np.ndarray:
    """Run the nodes that `write` adds to an emitter for a tensor."""
    g = Emitter({"dy"}, TensorProto.DOUBLE)
    name = write(g)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        g.nodes, "g", [value("dy", TensorProto.DOUBLE, dy.shape)],
        [value(name, TensorProto.DOUBLE, None)], g.initializers,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return ReferenceEvaluator(model).run(None, {"dy": dy})[0]


@given(st.data(), st.integers(1, 5), st.integers(0, 2))
@settings(max_examples=60)
def test_adjoint_of_taking_entries(data, size, axis):
    rows = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    shape = [2, 3, 4]
    shape[axis] = size
    generator = np.random.default_rng(0)
    x = generator.standard_normal(shape)
    dy = generator.standard_normal(np.take(x, rows, axis).shape)
    dx = written(lambda g: adjoint_of_take(g, "dy", dy.shape, axis, np.array(rows), size), dy)
    assert dx.shape == x.shape
    np.testing.assert_allclose((np.take(x, rows, axis) * dy).sum(), (x * dx).sum(), atol=1e-9)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
@settings(max_examples=40)
def test_adjoint_of_a_matrix(size, count, axis):
    generator = np.random.default_rng(size + 5 * count)
    matrix = generator.standard_normal((size, count))
    shape = [2, 3, 4]
    shape[axis] = size
    x = generator.standard_normal(shape)
    y = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix, -1, axis)
    dy = generator.standard_normal(y.shape)
    dx = written(lambda g: adjoint_of_matrix(g, "dy", dy.shape, axis, matrix), dy)
    np.testing.assert_allclose((y * dy).sum(), (x * dx).sum(), atol=1e-9)
