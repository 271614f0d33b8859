"""Which layers make an output entry by entry, and what their outputs count."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from cobla_onnx import Budget, compress
from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.slices import Slices
from cobla_onnx.calibration.evaluation.survey import OutputFacts
from cobla_onnx.calibration.heads import Curvature, curvatures, importances
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.runtime.session import open_session
from tests.builders import model_of, random_array

node = helper.make_node
PRODUCT = {"w": random_array(8, 6)}
KERNEL = {"w": random_array(6, 3, 1, 1)}
# Nodes behind a layer of six outputs; weights; shape of the input; the axis of the output.
HEADS = {
    "product": ([node("MatMul", ["x", "w"], ["y"])], PRODUCT, ["N", 5, 8], 2),
    "bias": (
        [node("MatMul", ["x", "w"], ["a"]), node("Add", ["b", "a"], ["y"])],
        {**PRODUCT, "b": random_array(6)},
        ["N", 5, 8],
        2,
    ),
    "turned": (
        [node("MatMul", ["x", "w"], ["a"]), node("Transpose", ["a"], ["y"], perm=[0, 2, 1])],
        PRODUCT,
        ["N", 5, 8],
        1,
    ),
    "Gemm": (
        [node("Gemm", ["x", "w"], ["y"], transB=1)],
        {"w": random_array(6, 8)},
        ["N", 8],
        1,
    ),
    "pooled": (
        [
            node("Conv", ["x", "w"], ["a"]),
            node("Relu", ["a"], ["r"]),
            node("GlobalAveragePool", ["r"], ["p"]),
            node("Flatten", ["p"], ["y"]),
        ],
        KERNEL,
        ["N", 3, 4, 4],
        1,
    ),
}
# The same, but the outputs do not reach the loss one by one.
OTHERS = {
    "another axis": ([node("MatMul", ["x", "w"], ["y"])], PRODUCT, ["N", 6, 8], 1),
    "two sources": (
        [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "z"], ["y"])],
        PRODUCT,
        ["N", 5, 8],
        2,
    ),
    "mixed": (
        [node("MatMul", ["x", "w"], ["a"]), node("Softmax", ["a"], ["y"])],
        PRODUCT,
        ["N", 5, 8],
        2,
    ),
    "halves": (
        [
            node("MatMul", ["x", "v"], ["a"]),
            node("MatMul", ["x", "u"], ["b"]),
            node("Concat", ["a", "b"], ["y"], axis=2),
        ],
        {"v": random_array(8, 3), "u": random_array(8, 3, seed=1)},
        ["N", 5, 8],
        2,
    ),
    "twice": (
        [node("MatMul", ["x", "w"], ["y"]), node("MatMul", ["z", "w"], ["other"])],
        PRODUCT,
        ["N", 5, 8],
        2,
    ),
}


def found(nodes, weights, shape, axis, classes=False):
    inputs = {"x": shape}
    if any("z" in each.input for each in nodes):
        inputs["z"] = shape if any(each.output[0] == "other" for each in nodes) else ["N", 5, 6]
    model = model_of(nodes, weights, inputs, ["y"])
    axes = len(model.graph.output[0].type.tensor_type.shape.dim)
    curvature = Curvature(axis, axes, classes, np.arange(1.0, 7.0))
    return importances(model, find_layers(model).layers, {"y": curvature})


@pytest.mark.parametrize("name", HEADS)
def test_the_layer_that_makes_the_output_is_weighted(name):
    ((_, weights),) = found(*HEADS[name]).items()
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(weights, np.arange(1.0, 7.0) / 3.5)


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_layer_is(name):
    assert not found(*OTHERS[name])


def test_a_softmax_is_passed_where_its_derivative_is_known():
    assert found(*OTHERS["mixed"], classes=True)


@pytest.mark.parametrize(("second", "even"), [([3, 5, 0, 0], False), ([0, 0, 4, 4], True)])
def test_classes_count_alike_where_half_of_the_samples_tell_nothing_of_the_rest(second, even):
    facts = OutputFacts(Slices(np.dtype(np.float32)))
    facts.slices.add(random_array(8, 4))
    first = [4, 4, 0, 0]
    facts.about[1, True] = np.array([[first], [second]], np.float64)
    found = curvatures({"y": Measure("logits")}, {"y": facts}, {})["y"]
    assert found.weights.mean() == pytest.approx(1)
    assert (found.weights == 1).all() == even
    assert (found.weights > 0).all()


def test_rank_goes_to_the_classes_that_samples_show():
    """Of 300 classes 24 are read from 12 inputs; 20 others move classes that are never meant."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 300)).astype(np.float32)
    weight[12:, :24] = 0
    weight[:12, 24:] = 0
    weight[:12] *= 5
    bias = np.where(np.arange(300) < 24, 0, -40).astype(np.float32)
    nodes = [
        node("MatMul", ["x", "w"], ["a"], name="head"),
        node("Add", ["a", "b"], ["c"]),
        node("Softmax", ["c"], ["y"]),
    ]
    model = model_of(nodes, {"w": weight, "b": bias}, {"x": ["N", 32]}, ["y"])
    result = compress(model, Budget(mem=0.5), data={"x": random_array(300, 32, seed=1)})
    fresh = random_array(500, 32, seed=2)
    first, second = (
        open_session(each, 1).run(None, {"x": fresh})[0].argmax(axis=1)
        for each in (model, result.model)
    )
    assert len(set(first)) == 24
    # With all classes alike 0.65 of the answers are the same.
    assert (first == second).mean() > 0.99
