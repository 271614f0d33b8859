"""Every rule is tested by its operator's name, in the tests of rules or of whole models."""

from __future__ import annotations

from pathlib import Path

import pytest

from cobla_onnx.autodiff.vjp import (
    activation,
    arithmetic,
    convolution,
    normalization,
    pooling,
    product,
    reduction,
    resize,
    shape,
)
from cobla_onnx.autodiff.vjp.registry import FLAT, RULES

MODULES = (
    activation, arithmetic, convolution, normalization, pooling, product, reduction, resize,
    shape,
)  # fmt: skip
TESTS = "\n".join(
    path.read_text(encoding="utf-8") for path in Path(__file__).parents[1].rglob("test_*.py")
)


def named(operator: str) -> str:
    """Return an operator as the tests write it; reductions go without their prefix."""
    return f'"{operator.removeprefix("Reduce")}"'


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_rules_of_a_module_are_tested(module):
    own = {name for name, rule in RULES.items() if rule.__module__ == module.__name__}
    assert own
    assert {name for name in own if named(name) not in TESTS} == set()


def test_each_operator_has_a_rule_or_no_gradient():
    assert not set(RULES) & set(FLAT)
    assert {rule.__module__ for rule in RULES.values()} <= {m.__name__ for m in MODULES}
