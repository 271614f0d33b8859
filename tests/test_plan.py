"""Plans as files: written, edited by hand, checked, applied again."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema
import numpy as np
import onnx
import pytest

from cobla_onnx import Budget, Plan, compress, errors
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.plan import Decision
from cobla_onnx.variants.registry import schemes
from tests.builders import small_network
from tests.cli.test_command import run, run_here

SCHEMA = json.loads(resources.files("cobla_onnx").joinpath("plan.schema.json").read_text())

GOOD = [
    {"version": 1, "factors": "weights", "layers": []},
    {"version": 1, "factors": "data", "layers": []},
    {"version": 1, "layers": []},
    {"version": 1, "layers": [{"layer": "a", "keep": True}]},
    {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": 3}]},
    {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": 3, "keep": False}]},
    {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": 3, "keep": True}]},
    {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": 3, "bits": 4}]},
    {"version": 1, "layers": [{"layer": "a", "scheme": "stored", "bits": 4}]},
    {"version": 1, "layers": [{"layer": "a", "scheme": "matrix", "rank": 3, "folded": True}]},
    {"version": 2, "layers": [{"layer": "a", "scheme": "channel", "rank": 3, "bits": 4}]},
    {"version": 2, "layers": [{"layer": "a", "scheme": "channel", "rank": 3}]},
    # A whole number in JSON, whose schemas do not tell it from 3.
    {"version": 1.0, "layers": [{"layer": "a", "scheme": "channel", "rank": 3.0, "bits": 4.0}]},
    {"version": 1, "layers": [{"layer": "a", "scheme": "rows", "bits": 8.0}]},
]
BAD = [
    ({"version": 3, "layers": []}, 'no "version" of 1 or 2'),
    ({"version": True, "layers": []}, 'no "version" of 1 or 2'),
    ({"layers": []}, 'no "version" of 1 or 2'),
    ({"version": 1}, 'no list "layers"'),
    ({"version": 1, "layers": {}}, 'no list "layers"'),
    ({"version": 1, "factors": "none", "layers": []}, '"factors" is "none"; allowed are data, w'),
    ({"version": 1, "layers": [], "layer": []}, "no field 'layer'; did you mean 'layers'?"),
    ({"version": 1, "layers": [3]}, r'layers\[0\]: needs a "layer"'),
    ({"version": 1, "layers": [{"rank": 3}]}, r'layers\[0\]: needs a "layer"'),
    ({"version": 1, "layers": [{"layer": "a"}]}, '\'a\': needs "scheme" and "rank"'),
    ({"version": 1, "layers": [{"layer": "a", "rank": 2}]}, "'a': needs \"scheme\""),
    ({"version": 1, "layers": [{"layer": "a", "keep": False}]}, "'a': needs \"scheme\""),
    ({"version": 1, "layers": [{"layer": "a", "keep": 1}]}, '"keep" is 1; write true or false'),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "chanel", "rank": 2}]},
        '\'a\': "scheme" is "chanel"; allowed are matrix, channel,',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": 0}]},
        '"rank" is 0; write a whole number of at least 1',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": "8"}]},
        '"rank" is "8"; write a whole number',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": 3.5}]},
        '"rank" is 3.5; write a whole number',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": True}]},
        '"rank" is true; write a whole number',
    ),
    (
        {"version": 2, "layers": [{"layer": "a", "scheme": "stored", "bits": 4.5}]},
        '"bits" is 4.5; allowed are 2, 3, 4, 5, 6, 8, 16',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rank": 8, "bits": 7}]},
        '"bits" is 7; allowed are 2, 3, 4, 5, 6, 8, 16',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "channel@4", "rank": 8}]},
        '"scheme" is "channel@4"; allowed are matrix, channel, ',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "rnak": 8}]},
        "'a': there is no field 'rnak'; did you mean 'rank'?",
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "stored", "rank": 8}]},
        "no field 'rank'; there are layer, keep, scheme, bits$",
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "channel", "bits": 4}]},
        '\'a\': needs "scheme" and "rank"',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "rows", "bits": 7}]},
        '"bits" is 7; allowed are 2, 3, 4, 5, 6, 8, 16',
    ),
    ({"version": 1, "layers": [{"layer": "a", "keep": True, "bits": 0}]}, '"bits" is 0; allowed'),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "matrix", "rank": 3, "folded": 1}]},
        '"folded" is 1; write true or false',
    ),
    (
        {"version": 1, "layers": [{"layer": "a", "scheme": "rows", "bits": 4, "folded": True}]},
        "no field 'folded'; there are layer, keep, scheme, bits$",
    ),
]


def test_the_schema_is_one_and_knows_the_schemes():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$defs"]["layer"]["properties"]["scheme"]["enum"] == [
        name for name in schemes() if "@" not in name
    ]


@pytest.mark.parametrize("content", GOOD)
def test_schema_and_reader_take(content):
    jsonschema.validate(content, SCHEMA)
    plan = Plan.from_json(json.dumps(content))
    written = json.loads(plan.to_json())
    jsonschema.validate(written, SCHEMA)
    # Readers of the first version, which know no bits, must not take what has some.
    assert written["version"] == (2 if plan.bits else 1)
    assert Plan.from_json(plan.to_json()) == plan
    assert "." not in plan.to_json()


@pytest.mark.parametrize("rank", ["NaN", "Infinity", "1e999"])
def test_what_is_no_number_is_no_rank(rank):
    text = f'{{"version": 1, "layers": [{{"layer": "a", "scheme": "channel", "rank": {rank}}}]}}'
    with pytest.raises(errors.UsageError, match="write a whole number"):
        Plan.from_json(text)


@pytest.mark.parametrize(("content", "message"), BAD)
def test_schema_and_reader_refuse(content, message):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)
    with pytest.raises(errors.UsageError, match=message):
        Plan.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((3,), '"layer" is 3; write the name'),
        (("a", 3, 8), "layer 'a': \"scheme\" is 3; write the name"),
        (("a", "matrix", "8"), 'layer \'a\': "rank" is "8"; write a whole number of at least 1'),
        (("a", "matrix", 8.5), '"rank" is 8.5; write a whole number'),
        (("a", "matrix", True), '"rank" is true; write a whole number'),
        (("a", "matrix", 0), '"rank" is 0; write a whole number'),
        (("a", "matrix", {8}), '"rank" is "\\{8\\}"; write a whole number'),
        (("a", "matrix"), 'needs "scheme" and "rank"'),
        (("a", None, 8), 'needs "scheme" and "rank"'),
        (("a", "matrix", 8, "yes"), '"folded" is "yes"; write true or false'),
    ],
)
def test_decisions_are_checked_when_they_are_made(fields, message):
    with pytest.raises(errors.UsageError, match=message):
        Decision(*fields)


@pytest.mark.parametrize(
    ("decisions", "factors", "message"),
    [
        ((Decision("a", "matrix", 4), Decision("a")), "data", "layer 'a' is listed twice"),
        ((), "foo", '"factors" is "foo"; allowed are data, weights'),
        ((), ["data"], '"factors" is .*; allowed are data, weights'),
        ((Decision("a"), None), "data", r"decisions\[1\] is a NoneType; give a Decision"),
        (Decision("a"), "data", "are a Decision; give a tuple"),
    ],
)
def test_plans_are_checked_when_they_are_made(decisions, factors, message):
    with pytest.raises(errors.UsageError, match=message):
        Plan(decisions, factors)


@pytest.mark.parametrize("rank", [np.int64(4), 4.0])
def test_other_whole_numbers_are_ranks(rank):
    plan = Plan([Decision("a", "matrix", rank)])
    assert plan == Plan((Decision("a", "matrix", 4),))
    assert Plan.from_json(plan.to_json()) == plan


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    text = json.dumps(GOOD[0])
    (tmp_path / "plan.json").write_text(text, encoding="utf-8-sig")
    assert Plan.read(tmp_path / "plan.json") == Plan.from_json(text)


def test_what_is_written_fits_the_schema():
    plan = compress(small_network(), Budget(mem=0.6), threads=1).plan
    jsonschema.validate(json.loads(plan.to_json()), SCHEMA)


def test_a_plan_needs_no_budget_but_keeps_one():
    plan = compress(small_network(), Budget(mem=0.6), threads=1).plan
    result = compress(small_network(), plan=plan, threads=1)
    assert result.plan == plan
    assert result.report.budget["mem"].limit is None
    assert result.report.budget["mem"].reached <= 0.6
    with pytest.raises(errors.BudgetError, match="the plan costs"):
        compress(small_network(), Budget(mem=0.4), plan=plan, threads=1)
    with pytest.raises(errors.UsageError, match="no budget"):
        compress(small_network())


def test_out_edit_and_in_again(demo_model, tmp_path):
    first, second, plan = (tmp_path / name for name in ("a.onnx", "b.onnx", "plan.json"))
    done = run(demo_model, first, "--mem", 0.4, "--plan-out", plan, "-q")
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(plan.read_text())
    assert run_here(demo_model, second, "--plan-in", plan, "-q").returncode == 0
    assert second.read_bytes() == first.read_bytes()
    for entry in content["layers"]:
        if entry["layer"] == "hidden":
            entry.clear()
            entry.update(layer="hidden", scheme="matrix", rank=5)
    plan.write_text(json.dumps(content))
    assert run_here(demo_model, second, "--plan-in", plan, "-q").returncode == 0
    assert stored_bytes(onnx.load(second)) < stored_bytes(onnx.load(first))
    plan.write_text('{"version": 1, "layers": [{"layer": "hiden", "keep": true}]}')
    done = run_here(demo_model, second, "--plan-in", plan)
    assert done.returncode == 2
    assert "did you mean hidden" in done.stderr
    plan.write_text("{")
    done = run_here(demo_model, second, "--plan-in", plan)
    assert done.returncode == 2
    assert f"{plan}: plan: is not JSON" in done.stderr
