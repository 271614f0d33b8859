"""Transposed convolutions: groups are refused, and entries are told apart by phase."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from onnx import helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.inventory import Reason
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.graph.operators.transposed_convolution import (
    TransposedConvolution,
    TransposedPatch,
)
from tests.builders import model_of, random_array
from tests.graph.operators.cases import Case, transposed_convolutions


def test_checks_are_those_of_a_convolution():
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], output_padding=[1])
    with pytest.raises(ModelError, match=r"output_padding \[1\] do not fit a kernel of 2 axes"):
        TransposedConvolution().check(node, (4, 2, 3, 3), "the node")


@pytest.mark.parametrize("outputs", [1, 2])
def test_groups_are_refused(outputs):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], "up", group=3)
    weights = {"w": random_array(3, outputs, 2, 2)}
    found = find_layers(model_of([node], weights, {"x": [1, 3, 4, 4]}, ["y"]))
    assert found.layers == ()
    assert [(item.reason, item.detail) for item in found.skipped] == [(Reason.GROUPED, "group 3")]


@settings(max_examples=40)
@given(transposed_convolutions())
def test_vectors_gather_what_the_operator_scatters(case: Case):
    """Each input is multiplied with the kernel and added at the places that it reaches."""
    channels, outputs, *kernel = case.weight
    weight, data = random_array(*case.weight, seed=1), random_array(*case.data, seed=2)
    model = model_of([case.node], {"w": weight}, {"x": list(case.data)}, ["y"])
    (layer,) = find_layers(model).layers
    patch = TransposedConvolution().patch(case.node, layer, layer.uses[0])
    assert isinstance(patch, TransposedPatch)
    assert not isinstance(patch.pads, str)
    sizes = zip(data.shape[2:], patch.strides, patch.dilations, kernel, patch.more, strict=True)
    whole = [(n - 1) * s + (k - 1) * d + 1 + more for n, s, d, k, more in sizes]
    scattered = np.zeros((len(data), outputs, *whole))
    for place in np.ndindex(*data.shape[2:]):
        for tap in np.ndindex(*kernel):
            moves = zip(place, tap, patch.strides, patch.dilations, strict=True)
            target = (..., *(p * s + t * d for p, t, s, d in moves))
            spread = np.einsum("nc,co->no", data[(..., *place)], weight[(..., *tap)])
            scattered[target] += spread
    half = len(kernel)
    ends = zip(patch.pads[:half], patch.pads[half:], whole, strict=True)
    kept = scattered[(..., *(slice(begin, size - end) for begin, end, size in ends))]
    rows = weight.swapaxes(0, 1).reshape(outputs, channels * int(np.prod(kernel)))
    vectors = np.concatenate(list(patch.vectors(data)), axis=2)[0]
    expected = patch.outputs(kept)[0]
    np.testing.assert_allclose(rows @ vectors, expected, rtol=1e-4, atol=1e-4)
