"""Values that the Python API is given are those that are declared, as on the command line."""

from __future__ import annotations

import dataclasses
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cobla_onnx
from cobla_onnx.errors import UsageError
from cobla_onnx.options import Settings
from cobla_onnx.options.checking import check_declared
from cobla_onnx.options.settings import options_of


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("objective", "best", "auto, weights, output or loss"),
        ("solver", "scip", "slsqp or milp"),
        ("storage", 8, "auto, cast or qdq"),
        ("loss", None, "auto, kl, mse or ce"),
        ("refit", "no", "True or False"),
        ("deduplicate", 1, "True or False"),
        ("threads", 0, "a whole number from 1 to 1024"),
        ("threads", 5000, "a whole number from 1 to 1024"),
        ("threads", True, "a whole number from 1 to 1024"),
        ("workers", -1, "a whole number from 1 to 1024"),
        ("seed", 1.5, "a whole number of at least 0"),
        ("seed", -1, "a whole number of at least 0"),
        ("samples", "all", "a whole number of at least 2"),
        ("batch", 0, "auto, or a whole number of at least 1"),
        ("batch", True, "auto, or a whole number of at least 1"),
        ("rank_multiple", "few", "auto, or a whole number from 1 to 1000000"),
        ("time_limit", float("nan"), "a number of at least 0"),
        ("exclude", "conv1", r"a list of texts, such as \['text'\]"),
        ("include", [1], r"a list of texts, such as \['text'\]"),
        ("cache", 3, "a text, or a path"),
        ("provider", b"CPU", "a text"),
        ("memory_limit", 1.5, "a whole number, or a text"),
        ("threads", 10**400, "a whole number from 1 to 1024"),
        ("workers", 10**30, "a whole number from 1 to 1024"),
        ("rank_multiple", 10**30, "auto, or a whole number from 1 to 1000000"),
        ("storage", np.array(["qdq"]), "auto, cast or qdq"),
        ("input_shapes", "x:1,3", r"a mapping of names to shapes, such as .*"),
        ("input_shapes", {"x": (1, 3.5)}, r"a mapping of names to shapes, such as .*"),
        ("progress", "yes", "a function"),
        ("executor", 3, r"an executor, such as concurrent\.futures\.ProcessPoolExecutor\(\)"),
        ("executor", ThreadPoolExecutor, r"an executor, such as .*"),
        ("outputs", 5, r"a text, or a list of texts, such as \['text'\], or a mapping of .*"),
    ],
)
def test_a_value_that_means_nothing_is_refused(name: str, value: object, wanted: str) -> None:
    with pytest.raises(UsageError, match=rf"^{name}(=.*)?: give {wanted}$"):
        cobla_onnx.compress("a.onnx", cobla_onnx.Budget(mem=0.5), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"threads": np.int64(2), "seed": np.uint8(1)},
        {"time_limit": np.float32(2)},
        {"time_limit": 3, "workers": None},
        {"include": ["a", "b"], "exclude": ()},
        {"include": {"a", "b"}, "seed": 10**400},
        {"cache": Path("folder"), "profile": "file.json"},
        {"batch": "auto", "memory_limit": "2GB"},
        {"storage": "qdq", "refit": False},
        {"outputs": "y"},
        {"outputs": {"y": "values"}, "input_shapes": {"x": [1, np.int64(3)]}},
    ],
)
def test_values_of_the_declared_types_are_taken(values: dict[str, object]) -> None:
    check_declared(Settings, values)


def test_defaults_are_values_of_the_declared_types() -> None:
    check_declared(Settings, vars(Settings()))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: cobla_onnx.compress("a.onnx", 0.3), r"^budget=0\.3: is not a Budget; give e\.g\."),
        (lambda: cobla_onnx.sweep("a.onnx", 0.3), r"^budget=0\.3: is not a Budget; give e\.g\."),
        (lambda: cobla_onnx.sweep("a.onnx", [0.3]), r"^budget=0\.3: is not a Budget; give e\.g\."),
        (lambda: cobla_onnx.Budget(mem="0.3"), r"^mem='0\.3': is not a fraction"),
        (lambda: cobla_onnx.Budget(mac=True), r"^mac=True: is not a fraction"),
        (lambda: cobla_onnx.compress("a.onnx", plan="p.json"), r"^plan='p\.json': is not a Plan"),
        (
            lambda: cobla_onnx.compress("a.onnx", max_drop="1%"),
            r"^max_drop='1%': is not a fraction",
        ),
        (lambda: cobla_onnx.inspect(None), r"^the model: is of type NoneType; give a path"),
    ],
)
def test_what_is_given_beside_the_options_is_checked(asked, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked()


def test_limits_of_comparisons_are_the_same() -> None:
    with pytest.raises(UsageError, match=r"^threads=0: give a whole number from 1 to 1024$"):
        cobla_onnx.compare("a.onnx", "b.onnx", threads=0)


@given(st.data())
def test_choices_and_limits_are_those_of_the_declaration(data: st.DataObject) -> None:
    hints = typing.get_type_hints(Settings)
    field = data.draw(st.sampled_from(options_of("compress")))
    flag = field.metadata["flag"]
    if flag is None:
        return
    if typing.get_origin(hints[field.name]) is typing.Literal:
        choices = typing.get_args(hints[field.name])
        check_declared(Settings, {field.name: data.draw(st.sampled_from(choices))})
        other = data.draw(st.text().filter(lambda text: text not in choices))
        with pytest.raises(UsageError):
            check_declared(Settings, {field.name: other})
    elif flag.minimum is not None:
        most = 10_000 if flag.maximum is None else flag.maximum
        inside = data.draw(st.integers(int(flag.minimum), int(most)))
        check_declared(Settings, {field.name: inside})
        below = data.draw(st.integers(max_value=int(flag.minimum) - 1))
        with pytest.raises(UsageError):
            check_declared(Settings, {field.name: below})


def test_what_is_not_in_the_table_is_left_to_who_reads_it() -> None:
    names = {field.name for field in dataclasses.fields(Settings)}
    assert "data" in names
    check_declared(Settings, {"data": object(), "no such option": 3})
