"""Factors of a plan that was made without the data."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from cobla_onnx import Plan, compress
from cobla_onnx.errors import UsageError
from cobla_onnx.plan import Decision
from tests.builders import model_of, random_array


def test_a_scheme_about_which_data_say_nothing_is_refused_or_follows_from_the_weights():
    """Vectors of 600 x 3 x 3 inputs are too long for their second moment."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], "wide")
    model = model_of([node], {"w": random_array(32, 600, 3, 3)}, {"x": ["N", 600, 4, 4]}, ["y"])
    data = {"x": np.random.default_rng(0).normal(size=(10, 600, 4, 4)).astype(np.float32)}
    decisions = (Decision("wide", "spatial-hw", 20),)
    with pytest.raises(UsageError, match=r"'spatial-hw'.* use channel, or .factors.: .weights."):
        compress(model, plan=Plan(decisions), data=data)
    result = compress(model, plan=Plan(decisions, factors="weights"), data=data)
    assert result.plan.decisions == decisions
