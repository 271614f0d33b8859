"""A cache does not count beside the outputs that are made from it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from cobla_onnx.calibration.evaluation.caches import without_caches
from cobla_onnx.calibration.evaluation.output_choice import OutputChoice
from tests.builders import model_of, random_array


def decoder(outputs: list[str]) -> onnx.ModelProto:
    """States are joined to those before; `state` is joined to nothing, `unread` is not read."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["state"], "fc"),
        helper.make_node("Concat", ["past", "state"], ["present"], "join", axis=1),
        helper.make_node("ReduceSum", ["present", "time"], ["said"], "sum"),
        helper.make_node("Concat", ["past", "state"], ["unread"], "other", axis=1),
    ]
    weights = {"w": random_array(6, 4), "time": np.array([1])}
    return model_of(
        nodes, weights, {"x": ["batch", "seq", 6], "past": ["batch", "past", 4]}, outputs
    )


def test_only_what_is_joined_to_a_past_and_read_on_is_a_cache():
    choices, notes = without_caches({}, decoder(["said", "state", "present", "unread"]))
    assert choices == {"present": OutputChoice("present", "ignore")}
    assert len(notes) == 1
    assert "output 'present': a cache" in notes[0]
    assert "--output present=values" in notes[0]


@pytest.mark.parametrize("how", ["values", None])
def test_the_user_decides(how):
    choice = {"present": OutputChoice("present", how)}
    assert without_caches(choice, decoder(["said", "present"])) == (choice, ())


def test_without_another_output_it_counts():
    assert without_caches({}, decoder(["present"])) == ({}, ())
    choice = {"said": OutputChoice("said", "ignore")}
    assert without_caches(choice, decoder(["said", "present"])) == (choice, ())
