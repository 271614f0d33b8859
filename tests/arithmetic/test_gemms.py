"""Gemms whose beta and bias onnxruntime's quantiser would lose, or not take."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from cobla_onnx.arithmetic.gemms import with_plain_gemms
from cobla_onnx.arithmetic.nodes import dynamic_nodes, weighted_nodes
from cobla_onnx.arithmetic.prepared import prepare
from cobla_onnx.arithmetic.quantise import quantised, quantised_at_run_time
from cobla_onnx.arithmetic.ranges import calibrated
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.runtime.session import open_session, run_session
from tests.builders import model_of, random_array

FEEDS = {"x": random_array(8, 12, seed=3)}


def gemm(bias: np.ndarray | None, *more: onnx.NodeProto, **attributes) -> onnx.ModelProto:
    read = ["x", "w"] if bias is None else ["x", "w", "c"]
    node = helper.make_node("Gemm", read, ["y"], "product", **attributes)
    weights = {"w": random_array(12, 6, seed=1)} | ({} if bias is None else {"c": bias})
    return model_of([node, *more], weights, {"x": [8, 12]}, ["y", *(n.output[0] for n in more)])


def run(model: onnx.ModelProto, *, optimized: bool = False) -> dict[str, np.ndarray]:
    return run_session(open_session(model, 1, optimized=optimized), FEEDS)


@pytest.mark.parametrize("beta", [1.0, 2.0, 0.5, 0.0, -1.0])
@pytest.mark.parametrize("alpha", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("shape", [(6,), (1, 6), (1,), (1, 1), ()])
def test_beta_and_a_bias_of_any_shape_are_in_what_computes_in_eight_bits(alpha, beta, shape):
    model = gemm(3 * random_array(*shape, seed=2), alpha=alpha, beta=beta)
    before = model.SerializeToString()
    plain = with_plain_gemms(model)
    assert model.SerializeToString() == before
    expected = run(model)["y"]
    np.testing.assert_allclose(run(plain)["y"], expected, rtol=1e-5, atol=1e-5)
    prepared, weighted = prepare(plain), weighted_nodes(plain)
    assert weighted == (0,)
    results = [quantised(prepared, calibrated(prepared, [FEEDS], "min-max"), weighted)]
    assert bool(dynamic_nodes(plain, weighted)) == (alpha == 1.0)
    if alpha == 1.0:
        results.append(quantised_at_run_time(prepared, weighted))
    for result in results:
        found = run(result, optimized=True)["y"]
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_where_there_is_nothing_to_do_the_model_stays():
    for bias in (None, random_array(6)):
        model = gemm(bias, alpha=2.0)
        assert with_plain_gemms(model) is model
    model = gemm(random_array(6), beta=2.0)
    assert with_plain_gemms(model, spared={"y"}) is model
    # Another number in each row, or one that is computed: there is no bias for each channel.
    model = gemm(random_array(8, 6), beta=2.0)
    assert with_plain_gemms(model) is model
    assert weighted_nodes(model) == weighted_nodes(gemm(random_array(8, 1))) == ()
    model = gemm(random_array(6), beta=2.0)
    model.graph.node.insert(0, helper.make_node("Neg", ["c"], ["computed"]))
    model.graph.node[1].input[2] = "computed"
    assert with_plain_gemms(model) is model


def test_what_else_reads_the_bias_reads_what_it_read():
    bias = random_array(6, seed=2)
    model = gemm(bias, helper.make_node("Neg", ["c"], ["z"]), beta=2.0)
    plain = with_plain_gemms(model)
    np.testing.assert_array_equal(run(plain)["z"], -bias)
    np.testing.assert_allclose(run(plain)["y"], run(model)["y"], rtol=1e-5, atol=1e-5)


def test_a_bias_that_nothing_reads_any_more_is_stored_no_more():
    model = gemm(random_array(6, seed=2), beta=2.0)
    (value,) = (t for t in model.graph.initializer if t.name == "c")
    model.graph.input.append(helper.make_tensor_value_info("c", value.data_type, value.dims))
    plain = with_plain_gemms(model)
    assert stored_bytes(plain) == stored_bytes(model)
    assert [value.name for value in plain.graph.input] == ["x"]
    # Before IR version 4 every initializer is an input as well.
    model.ir_version = 3
    named = {tensor.name for tensor in with_plain_gemms(model).graph.initializer}
    assert named - {"w"} <= {value.name for value in with_plain_gemms(model).graph.input}


def test_beta_without_a_bias_means_nothing_and_one_of_nought_does_not_read_it():
    plain = with_plain_gemms(gemm(None, beta=2.0))
    assert dynamic_nodes(plain, weighted_nodes(plain)) == (0,)
    plain = with_plain_gemms(gemm(np.full(6, np.nan, np.float32), beta=0.0))
    (bias,) = (t for t in plain.graph.initializer if t.name != "w")
    assert not numpy_helper.to_array(bias).any()
