"""Names that a user gives: the very name first, a glob second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx import Budget, compress
from cobla_onnx.errors import UsageError
from cobla_onnx.names import matching
from tests.builders import model_of, random_array

NAMES = st.text("ab[]*?0-!", min_size=1, max_size=6)


@given(st.lists(NAMES, min_size=1, unique=True))
def test_every_name_means_itself_alone(names):
    for name in names:
        assert matching(name, names) == {name}


def test_globs_mean_what_they_match():
    names = ["a1/fc", "a2/fc", "a[1]/fc"]
    assert matching("a?/*", names) == {"a1/fc", "a2/fc"}
    assert matching("a[1]/fc", names) == {"a[1]/fc"}
    assert matching("a[12]/fc", names) == {"a1/fc", "a2/fc"}
    assert matching("b*", names) == set()


def test_layers_whose_names_are_globs():
    names = ["blocks[0]/fc", "blocks[1]/fc", "blocks0/fc"]
    nodes = [
        helper.make_node("MatMul", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name)
        for i, name in enumerate(names)
    ]
    weights = {f"w{i}": random_array(32, 32, seed=i) for i in range(3)}
    model = model_of(nodes, weights, {"t0": ["n", 32]}, ["t3"])
    report = compress(model, Budget(mem=0.8), exclude=["blocks[0]/fc"], threads=1).report
    assert [layer.name for layer in report.layers if layer.reason == "excluded by option"] == [
        "blocks[0]/fc"
    ]
    with pytest.raises(UsageError, match=r"did you mean blocks\[1\]/fc"):
        compress(model, Budget(mem=0.8), include=["blocks[2]/fc"], threads=1)
