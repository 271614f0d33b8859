"""What is left in floating point: the few nodes that take back what 8 bits lose."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx import Budget, compress
from cobla_onnx.graph.macs import fixed_input_shapes, infer_shapes, node_macs
from cobla_onnx.pipeline.search.floating import promising, takes_back
from tests.builders import model_of, random_array


def losing(costs):
    """Return what loses so much for each place in 8 bits, on 20 samples, and counts."""
    asked = []

    def without(places):
        asked.append(tuple(places))
        left = sum(cost for place, cost in enumerate(costs) if place not in places)
        return left * np.linspace(0.9, 1.1, 20)

    return without, asked


@given(st.integers(1, 60), st.data())
def test_those_that_lose_much_are_found_in_few_questions(count, data):
    culprits = data.draw(st.sets(st.integers(0, count - 1), max_size=3))
    costs = [1.0 if place in culprits else 0.001 for place in range(count)]
    without, asked = losing(costs)
    found = promising(range(count), without, without(()), sum(costs))
    assert set(found) == culprits if culprits else count >= len(found)
    if culprits:
        assert len(asked) <= 2 + 2 * len(culprits) * np.ceil(np.log2(count) + 1)


def test_where_all_lose_alike_few_questions_are_asked():
    without, asked = losing([1.0] * 64)
    assert promising(range(64), without, without(()), 64.0) == []
    assert len(asked) < 20


def test_the_one_that_takes_back_most_comes_first():
    costs = [0.0, 1.0, 0.0, 3.0, 2.0, 0.0]
    without, _ = losing(costs)
    assert promising(range(6), without, without(()), 6.0) == [3, 4]
    # A node that others must be left with is asked for by itself.
    some = lambda places: None if len(places) > 3 else without(places)  # noqa: E731
    assert promising(range(6), some, without(()), 6.0) == [3, 4]


def test_nothing_is_left_where_nothing_is_lost():
    losses = np.ones(9)
    assert promising([0, 1], lambda places: losses, losses, 0.0) == []
    assert not takes_back(losses, losses / 2, float("inf"))


def test_a_sample_that_makes_nearly_all_of_the_loss_is_no_noise_if_all_others_gain():
    before = np.array([3.8, 1e-4, 2e-3, 1e-5, 3e-4, 1e-3, 2e-4, 5e-4])
    assert takes_back(before, before / 400, before.mean())
    # Where the others lose as often as they gain, it is.
    after = before * np.array([0.01, 30.0, 1.0, 50.0, 0.5, 2.0, 0.9, 4.0])
    assert not takes_back(before, after, before.mean())


@pytest.mark.parametrize("inferred", [True, False])
def test_a_node_in_the_middle_that_ruins_all_stays_in_floating_point(inferred):
    """Its input has one channel of large numbers, beside which 8 bits round all others to 0.

    Its MACs may only be known from a run.
    """
    rng = np.random.default_rng(0)
    weights = {
        "w": random_array(16, 3, 3, 3),
        "scale": np.where(np.arange(16) == 0, 3000.0, 1.0).astype(np.float32).reshape(16, 1, 1),
        "v": np.where(np.arange(16) == 0, 1e-4, 1.0).reshape(1, 16, 1, 1).astype(np.float32)
        * random_array(16, 16, 1, 1, seed=1),
        "u": random_array(64, 16, 3, 3, seed=2),
        "t": random_array(10, 64, 3, 3, seed=3),
    }
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"], "first"),
        onnx.helper.make_node("Mul", ["a", "scale"], ["b"]),
        onnx.helper.make_node("Reshape", ["b", "shape"], ["b'"]),
        onnx.helper.make_node("Conv", ["b'", "v"], ["c"], "middle"),
        onnx.helper.make_node("Relu", ["c"], ["d"]),
        onnx.helper.make_node("Conv", ["d", "u"], ["e"], "next"),
        onnx.helper.make_node("Relu", ["e"], ["f"]),
        onnx.helper.make_node("Conv", ["f", "t"], ["y"], "last"),
    ]
    if inferred:
        weights["shape"] = np.array([0, 16, 12, 12])
    else:
        nodes[1:1] = [
            onnx.helper.make_node("Shape", ["a"], ["sizes"]),
            onnx.helper.make_node("Cast", ["sizes"], ["numbers"], to=onnx.TensorProto.FLOAT),
            onnx.helper.make_node("Ceil", ["numbers"], ["whole"]),
            onnx.helper.make_node("Cast", ["whole"], ["shape"], to=onnx.TensorProto.INT64),
        ]
    model = model_of(nodes, weights, {"x": ["N", 3, 14, 14]}, ["y"])
    _, unknown = node_macs(model, infer_shapes(model, fixed_input_shapes(model, {})))
    assert bool(unknown) != inferred
    data = {"x": rng.standard_normal((40, 3, 14, 14), np.float32)}
    result = compress(
        model, Budget(mem=1.0), data=data, arithmetic="int8", threads=1, solver="milp"
    )
    said = result.report.arithmetic
    assert said.left == ("middle",)
    assert said.loss < 0.2 * said.candidates[said.ranges]
    assert result.report.verification.outputs[0].relative_l2 == pytest.approx(0.0, abs=0.1)
