"""What reports are made of: numbers, calls and plain values."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx import Budget
from cobla_onnx.report.amounts import budget_name, count_text, elsewhere_text, percent_text
from cobla_onnx.report.provenance import call_text, command_text
from cobla_onnx.report.serialise import Exported

UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


@given(st.integers(0, 10**12))
def test_counts_keep_three_digits(number):
    text = count_text(number)
    unit = UNITS.get(text[-1])
    value = float(text[:-1]) * unit if unit else float(text)
    assert value == pytest.approx(number, rel=0.005)


@given(st.floats(1e-4, 1))
def test_percentages_keep_two_digits(fraction):
    number, sign = percent_text(fraction).split()
    assert sign == "%"
    assert float(number) / 100 == pytest.approx(fraction, rel=0.05)


def test_budgets_and_bytes_by_operator():
    assert budget_name(Budget(mem=0.5, latency=0.25)) == "mem 0.5 latency 0.25"
    held = {f"Op{i}": 1000 for i in range(6)}
    assert elsewhere_text(held) == "1k in Op0, 1k in Op1, 1k in Op2, 1k in Op3, 2k in others"
    assert percent_text(None) == "?"


@given(st.lists(st.text(min_size=1).filter(lambda text: "\x00" not in text), max_size=3))
def test_a_command_is_one_that_the_shell_reads_again(arguments):
    import shlex

    assert shlex.split(command_text(["/bin/cobla-onnx", *arguments])) == ["cobla-onnx", *arguments]


@given(st.dictionaries(st.sampled_from(["seed", "name"]), st.integers() | st.text()))
def test_a_call_is_one_that_python_reads_again(given_values):
    def function(model, *, seed=0, name="a"):
        return {"model": model, "seed": seed, "name": name}

    text = call_text(function, {"model": "m.onnx", **given_values})
    found = eval(text, {"function": function})
    assert found == function("m.onnx", **given_values)


@dataclass(frozen=True)
class Example(Exported):
    value: float
    items: tuple[int, ...] = ()


def test_results_are_plain_values_with_a_version_and_never_nan():
    found = Example(0.5, (1, 2)).to_json()
    assert json.loads(found) == {"schema_version": 1, "value": 0.5, "items": [1, 2]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        Example(float("nan")).to_json()
