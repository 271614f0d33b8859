"""Nodes against the definition of their operator."""

from __future__ import annotations

import pytest
from onnx import helper

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.check.schemas import Schemas

node = helper.make_node
VERSIONS = [helper.make_opsetid("", 17), helper.make_opsetid("unknown.domain", 1)]


@pytest.mark.parametrize(
    "good",
    [
        node("Relu", ["x"], ["y"]),
        node("Gemm", ["a", "b"], ["y"], alpha=2.0),
        node("Anything", [], ["y"], domain="unknown.domain", size=3),
    ],
)
def test_what_is_defined_or_not_known_passes(good):
    Schemas(VERSIONS).check(good, "node")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (node("Relu", [], ["y"]), "node: "),
        (node("Relu", ["x", "z"], ["y"]), "node: "),
        (node("Relu", ["x"], ["y", "z"]), "node: "),
        (node("Gemm", ["a", "b"], ["y"], alpha=2), "node: .*alpha"),
        (node("", ["x"], ["y"]), "has no operator"),
    ],
)
def test_what_contradicts_the_definition_is_refused(bad, words):
    with pytest.raises(ModelError, match=words):
        Schemas(VERSIONS).check(bad, "node")


def test_own_operators_without_a_version_are_refused():
    with pytest.raises(ModelError, match="does not import"):
        Schemas([helper.make_opsetid("other", 1)]).check(node("Relu", ["x"], ["y"]), "node")
