"""Rules of reductions."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from tests.autodiff.differences import check, distinct, ints, normal

node = helper.make_node


REDUCTIONS = ["Sum", "Mean", "Max", "Min", "SumSquare", "L1", "L2", "LogSumExp"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("axes", [(1,), (-1, 0), None])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_reductions(reduction, axes, keepdims):
    operator = f"Reduce{reduction}"
    opset = 20 if reduction in ("Max", "Min") else 18
    constants = {} if axes is None else {"axes": ints(*axes)}
    reduce = node(operator, ["x", *constants], ["y"], keepdims=keepdims)
    check(reduce, {"x": distinct(2, 3, 4, spacing=0.1)}, constants=constants, opset=opset)


def test_a_reduction_over_no_axes():
    reduce = node("ReduceSum", ["x"], ["y"], noop_with_empty_axes=1)
    check(reduce, {"x": normal(2, 3)})
    log = node("ReduceLogSum", ["x"], ["y"])
    check(log, {"x": np.abs(normal(2, 3)) + 1})
