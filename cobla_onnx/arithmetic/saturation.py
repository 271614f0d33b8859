"""Whether this processor computes sums of 8-bit products right.

Without instructions for 8-bit dot products, x86 adds pairs of products of an unsigned and a signed
byte in 16 bits, where two large ones do not fit: the sum stops at 32767, and nothing says so. It is
seen by computing one, and not by the processor's name.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cobla_onnx.runtime.session import open_session, run_session

__all__ = ["sums_saturate"]

CHANNELS = 64


@cache
def sums_saturate() -> bool:
    """Run a convolution whose sums are as large as can be; return whether they come out smaller."""
    (found,) = run_session(open_session(_largest_sums(), 1, optimized=True), _inputs()).values()
    # A unit of the result is one hundredth of the sum.
    return bool(np.abs(found.astype(int) - 100).max() > 1)


def _inputs() -> dict[str, np.ndarray]:
    return {"x": np.full((1, CHANNELS, 8, 8), 255, np.uint8)}


def _largest_sums() -> onnx.ModelProto:
    """Make a convolution of unsigned by signed bytes, all of them the largest."""
    values = {
        "x_scale": np.float32(1),
        "x_zero": np.uint8(0),
        "w": np.full((CHANNELS, CHANNELS, 1, 1), 127, np.int8),
        "w_scale": np.ones(CHANNELS, np.float32),
        "w_zero": np.zeros(CHANNELS, np.int8),
        "y_scale": np.float32(CHANNELS * 255 * 127 / 100),
        "y_zero": np.uint8(0),
    }
    node = helper.make_node("QLinearConv", ["x", *values], ["y"])
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    shape = [1, CHANNELS, 8, 8]
    graph = helper.make_graph(
        [node],
        "largest sums",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, shape)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
