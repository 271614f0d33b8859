"""The rule of Resize."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from tests.autodiff.differences import check, ints, normal

node = helper.make_node


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "nearest"},
        {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        },
        {"mode": "linear"},
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        {"mode": "cubic"},
        {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"},
    ],
    ids=str,
)
@pytest.mark.parametrize("factor", [(2.0, 2.0), (1.0, 3.0), (0.5, 1.5)])
def test_resize(settings, factor):
    resize = node("Resize", ["x", "", "s"], ["y"], **settings)
    constants = {"s": np.array([1, 1, *factor], dtype=np.float32)}
    check(resize, {"x": normal(1, 2, 4, 6)}, constants=constants, tolerance=1e-5)


def test_resize_to_a_size():
    resize = node("Resize", ["x", "", "", "n"], ["y"], axes=[2, 3], mode="linear")
    check(resize, {"x": normal(1, 2, 4, 6)}, constants={"n": ints(7, 3)}, tolerance=1e-5)


def test_upsample_is_converted():
    upsample = node("Upsample", ["x", "s"], ["y"], mode="nearest")
    scales = {"s": np.array([1, 1, 2, 3], dtype=np.float32)}
    nodes = [upsample]
    check(nodes, {"x": normal(1, 2, 2, 3)}, constants=scales, opset=9)
