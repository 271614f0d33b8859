# ruff: noqa: F821, SIM108
"""Functions in onnxscript, which reads the source of this module; skipped without it."""

import pytest

pytest.importorskip("onnxscript")

from onnxscript import FLOAT, script
from onnxscript import opset17 as op
from onnxscript.values import Opset

MINE = Opset("mine", 1)


@script(MINE, default_opset=op)
def linear(x, weight, bias):
    """Return a linear layer."""
    return op.Add(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), bias)


@script(MINE, default_opset=op)
def block(x, weight, bias):
    """Return a linear layer and its activation."""
    return op.Relu(linear(x, weight, bias))


@script(default_opset=op)
def network(
    x: FLOAT["N", 16], w: FLOAT[16, 16], b: FLOAT[16], v: FLOAT[16, 16], u: FLOAT[16, 16]
) -> FLOAT["N", 16]:
    """Return what a linear layer or another product makes of a block."""
    h = block(x, w, b)
    if op.ReduceSum(h, keepdims=0) > 60.0:
        y = linear(h, v, b)
    else:
        y = op.MatMul(h, u)
    return y
