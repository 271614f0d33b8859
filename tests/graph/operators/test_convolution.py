"""Attributes of convolutions that do not fit, and patches by their definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from onnx import helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.operators.convolution import Convolution, ConvPatch, geometry_of
from tests.builders import random_array
from tests.graph.operators.cases import Case, convolutions

WRONG = [
    ({"group": 0}, "group 0 does not divide the 4 channels"),
    ({"group": 3}, "group 3 does not divide the 4 channels"),
    ({"kernel_shape": [3, 5]}, r"kernel_shape says \[3, 5\], its weight has \[3, 3\]"),
    ({"strides": [1]}, r"strides \[1\] do not fit a kernel of 2 axes"),
    ({"strides": [0, 1]}, r"strides \[0, 1\] do not fit"),
    ({"dilations": [1, 2**40]}, r"dilations \[1, 1099511627776\] do not fit"),
    ({"pads": [1, 1]}, r"pads \[1, 1\] do not fit"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_attributes_that_do_not_fit_the_weight(values, message):
    node = helper.make_node("Conv", ["x", "w"], ["y"], **values)
    with pytest.raises(ModelError, match=f"the node: {message}"):
        Convolution().check(node, (4, 2, 3, 3), "the node")


def test_a_weight_of_two_axes():
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    message = r"weight has shape \[4, 2\], a Conv's has 3 axes or more"
    with pytest.raises(ModelError, match=message):
        Convolution().check(node, (4, 2), "the node")


def test_negative_padding_cuts_data_off():
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[-1, 0, 0, 0])
    Convolution().check(node, (4, 2, 3, 3), "the node")


@settings(max_examples=40)
@given(convolutions())
def test_patches_by_their_definition(case: Case):
    kernel, group = case.weight[2:], case.data[1] // case.weight[1]
    moves = geometry_of(case.node, kernel)
    patch = ConvPatch("x", group, case.weight[1], kernel, *moves)
    assert not isinstance(moves.pads, str)
    half = len(kernel)
    ends = list(zip(moves.pads[:half], moves.pads[half:], strict=True))
    data = random_array(*case.data)
    padded = np.pad(data, [(0, 0), (0, 0), *ends])
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, moves.dilations, strict=True)]
    counts = [
        (size - span) // stride + 1
        for size, span, stride in zip(padded.shape[2:], spans, moves.strides, strict=True)
    ]
    expected = []
    for sample, *place in itertools.product(range(len(data)), *map(range, counts)):
        starts = [p * s for p, s in zip(place, moves.strides, strict=True)]
        taps = [
            np.arange(k) * d + start
            for k, d, start in zip(kernel, moves.dilations, starts, strict=True)
        ]
        window = padded[np.ix_([sample], range(data.shape[1]), *taps)]
        expected.append(window.reshape(group, patch.size))
    found = np.concatenate(list(patch.vectors(data)), axis=2)
    np.testing.assert_array_equal(found, np.stack(expected, axis=2))
