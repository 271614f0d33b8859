"""Rules of normalisations."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from tests.autodiff.differences import check, check_linear, normal

node = helper.make_node


def test_batch_normalization():
    arrays = {"x": normal(2, 3, 4), "scale": normal(3, seed=1), "bias": normal(3, seed=2)}
    arrays |= {"mean": normal(3, seed=3), "variance": np.abs(normal(3, seed=4)) + 0.5}
    check(node("BatchNormalization", list(arrays), ["y"], epsilon=0.01), arrays)


def test_instance_normalization():
    arrays = {"x": normal(2, 3, 4, 2), "scale": normal(3, seed=1), "bias": normal(3, seed=2)}
    check(node("InstanceNormalization", list(arrays), ["y"]), arrays)


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization(axis):
    shape = (2, 3, 4)[axis:]
    arrays = {"x": normal(2, 3, 4), "scale": normal(*shape), "bias": normal(*shape, seed=2)}
    check(node("LayerNormalization", list(arrays), ["y"], axis=axis), arrays)


def test_lp_normalization():
    check(node("LpNormalization", ["x"], ["y"], p=2, axis=1), {"x": normal(2, 4)})
    # The reference's norm for p = 1 is a sum without absolute values.
    check_linear(node("LpNormalization", ["x"], ["y"], p=1), {"x": normal(2, 4)}, step=0.003)
