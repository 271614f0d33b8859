"""Names that a user gives: the very name first, a glob second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from cobla_onnx import Budget, compress
from cobla_onnx.errors import UsageError
from cobla_onnx.text import matching, safe_text, short_names
from tests.builders import model_of, random_array

NAMES = st.text("ab[]*?0-!", min_size=1, max_size=6)


@given(st.lists(NAMES, min_size=1, unique=True))
def test_every_name_means_itself_alone(names):
    for name in names:
        assert matching(name, names) == {name}


LONG = st.text("ab/.0", min_size=1, max_size=60)


@given(st.lists(LONG, max_size=30), st.integers(12, 40))
def test_different_names_are_shown_differently(names, limit):
    shown = short_names(names, limit)
    assert set(shown) == set(names)
    assert len(set(shown.values())) == len(shown)
    assert all(len(text) <= limit for text in shown.values())
    assert all(text == name for name, text in shown.items() if len(name) <= limit)


@pytest.mark.parametrize("limit", [28, 40])
@pytest.mark.parametrize("name", ["/encoder/layer.{}/attention/self/query/MatMul", "{:>70}/MatMul"])
def test_the_part_that_tells_layers_apart_is_shown(name, limit):
    names = [name.format(number).replace(" ", "x") for number in range(12)]
    for number, text in enumerate(short_names(names, limit).values()):
        assert str(number) in text
        assert len(text) <= limit


def test_one_name_is_shortened_as_ever():
    name = "x" * 30 + "y" * 30
    assert short_names([name], 20)[name] == safe_text(name, 20) == "x" * 9 + "…" + "y" * 10


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
