"""Rules of matrix products."""

from __future__ import annotations

import pytest
from onnx import helper

from tests.autodiff.differences import check, normal

node = helper.make_node


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3), (3, 4)),
        ((5, 2, 3), (3, 4)),
        ((5, 2, 3), (5, 3, 4)),
        ((2, 1, 2, 3), (5, 3, 4)),
        ((2, 3), (5, 3, 4)),
        ((3,), (3, 4)),
        ((2, 3), (3,)),
        ((3,), (3,)),
        ((3,), (5, 3, 4)),
        ((5, 2, 3), (3,)),
    ],
    ids=str,
)
def test_matmul(shapes):
    inputs = {"a": normal(*shapes[0]), "b": normal(*shapes[1], seed=1)}
    check(node("MatMul", ["a", "b"], ["y"]), inputs)


@pytest.mark.parametrize("turned_a", [0, 1])
@pytest.mark.parametrize("turned_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (4,), (2, 1), (2, 4)])
def test_gemm(turned_a, turned_b, bias):
    inputs = {
        "a": normal(*((3, 2) if turned_a else (2, 3))),
        "b": normal(*((4, 3) if turned_b else (3, 4)), seed=1),
    }
    if bias is not None:
        inputs["c"] = normal(*bias, seed=2)
    gemm = node("Gemm", list(inputs), ["y"], transA=turned_a, transB=turned_b, alpha=0.7, beta=1.3)
    check(gemm, inputs)
