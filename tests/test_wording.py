"""Messages name options as the one who reads them gives them: arguments in Python, or flags."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

import cobla_onnx
from cobla_onnx import Budget, Plan, compress, errors, sweep
from cobla_onnx.calibration.data.readers import ImageOptions
from cobla_onnx.options.settings import ImageFlags, Settings
from cobla_onnx.text import safe_text
from cobla_onnx.wording import BOTH, either, in_flags, in_python, option_name
from tests.builders import model_of, random_array, small_network
from tests.cli.test_command import run_here

DATA = {"x": random_array(8, 3, 12, 12, seed=7)}
PACKAGE = Path(cobla_onnx.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z]")
# Texts without the marks between which both spellings stand.
plain = st.text(st.characters(exclude_categories=["C"]), max_size=20)


@given(plain, plain, plain, plain)
def test_each_reader_gets_one_spelling_and_all_else(before, python, command, after):
    message = before + either(python=python, command=command) + after
    assert in_flags(message) == before + command + after
    expected = python.removesuffix("=") if after.startswith(":") else python
    assert in_python(message) == before + expected + after


@given(st.text(max_size=20))
def test_safe_names_cannot_pretend_to_be_options(name):
    assert not BOTH.search(safe_text(f"\ue000{name}\ue001{name}\ue002", 200))


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.tuples(st.integers(1, 9))))
def test_values_are_written_so_that_python_reads_them(shapes):
    text = in_python(option_name("input_shapes", shapes))
    assert ast.literal_eval(text.removeprefix("input_shapes=")) == shapes


def test_flags_are_those_that_options_are_declared_with():
    for field in (*dataclasses.fields(Settings), *dataclasses.fields(ImageFlags)):
        if field.metadata.get("flag") is not None:
            flag = field.metadata["flag"].name.partition("/")[0]
            assert in_flags(option_name(field.name)) == flag


def texts_of_errors() -> Iterator[tuple[str, str]]:
    """Yield texts in `raise` statements and errors that are built, but for spellings of both."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            builds = isinstance(node, ast.Call) and str(getattr(node.func, "id", "")) in vars(
                errors
            )
            if isinstance(node, ast.Raise) or builds:
                yield from ((path.name, text) for text in constants(node))


def constants(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "either":
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from constants(child)


def test_no_error_of_the_package_spells_a_flag_itself():
    found = list(texts_of_errors())
    assert len(found) > 300
    assert [place for place in found if FLAG.search(place[1])] == []


def dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose MACs are not known, since sizes of its input are open."""
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "size"
    del model.graph.value_info[:]
    return model


def compressing(*budget: float, **options: object) -> Callable[[], object]:
    options = {"threads": 1, **options}
    return lambda: compress(small_network(), Budget(*budget) if budget else None, **options)


def nearly_all_elsewhere() -> onnx.ModelProto:
    """Return a model whose only layer holds little of its bytes."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "layer"),
        helper.make_node("Add", ["a", "b"], ["y"], "bias"),
    ]
    weights = {"w": random_array(8, 8), "b": random_array(100, 8)}
    return model_of(nodes, weights, {"x": [100, 8]}, ["y"])


# What is asked for wrongly in Python, and a part of the message.
IN_PYTHON: list[tuple[Callable[[], object], str]] = [
    (lambda: Budget(), "give mem=, mac= or latency=, e.g. mem=0.5"),
    (lambda: Budget(mem=2), "mem=2: is not a fraction"),
    (compressing(), "e.g. budget=Budget(mem=0.5)"),
    (lambda: sweep(small_network(), []), "[Budget(mem=0.3), "),
    (compressing(0.001), "mem=0.001 is below the least"),
    (compressing(0.01, exclude=["conv*"]), "2 layers left out by exclude=;"),
    (compressing(0.01, min_size=10**6), "lower min_size="),
    (
        lambda: compress(nearly_all_elsewhere(), Budget(mem=0.5), min_size=1000),
        "no layer can be compressed (1 x smaller than min_size=; ",
    ),
    (compressing(0.5, labels=[1]), "labels: are those of the data; give data= too"),
    (compressing(0.5, outputs=["y"]), "outputs: says how data"),
    (compressing(0.5, outputs=["y"], data=DATA), "outputs='y': the model has no"),
    (compressing(0.5, objective="loss"), "give data=, or objective='weights'"),
    (compressing(0.5, memory_limit="2 TBs"), "memory_limit='2 TBs': is not a number of bytes"),
    (compressing(0.5, batch=0), "batch=0: give auto, or a whole number of at least 1"),
    (compressing(0.5, rank_multiple=0), "rank_multiple=0: give auto"),
    (compressing(0.5, profile="a.json"), "give latency= or measure_latency=True too"),
    (compressing(0.5, include=["nothing"]), "include=['nothing']: matches no layer"),
    (compressing(0.5, data="nowhere"), "data='nowhere': does not exist"),
    (compressing(0.5, input_shapes={"x": (1, 4, 20, 20)}), "input_shapes={'x': (1, 4, 20, 20)}: "),
    (compressing(0.5, input_shapes={"z": (1,)}), "input_shapes['z']: the model has no such"),
    (compressing(0.5, workers=0), "workers=0: give a whole number from 1 to 1024"),
    (compressing(0.5, provider="none"), "provider='none': onnxruntime"),
    (compressing(max_drop=1.5, data=DATA), "max_drop=1.5: is not a fraction from 0 up to 1"),
    (compressing(max_drop=0.1), "max_drop: is measured on samples; give data= too"),
    (compressing(max_drop=0.1, plan=Plan(())), "max_drop: chooses ranks, which plan= has"),
    (lambda: compress(dynamic(small_network()), Budget(mac=0.5)), "input_shapes={'x': (1, 3, ?,"),
    (lambda: Plan.from_json("{}"), "write one with Plan.save()"),
    (lambda: ImageOptions(std=(0.0,)), "std= not 0"),
    (lambda: ImageOptions(mean=0.5), "write e.g. scale=0.00392157, mean=(0.485, 0.456, 0.406), "),
    (lambda: ImageOptions(std=("a",)), "have to be finite numbers"),
]


@pytest.mark.parametrize(("ask", "part"), IN_PYTHON, ids=[part for _, part in IN_PYTHON])
def test_python_names_arguments_and_the_same_error_knows_the_flags(ask, part):
    with pytest.raises(errors.CoblaError) as caught:
        ask()
    assert part in str(caught.value)
    for text in (str(caught.value), caught.value.in_flags()):
        assert not BOTH.search(text)
        assert safe_text(text, 10_000) == text
    assert not FLAG.search(str(caught.value))
    assert FLAG.search(caught.value.in_flags())


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "no budget: give --mem, --mac or --latency, e.g. --mem 0.5"),
        (["--mem", 2], "--mem 2: is not a fraction of the original to keep"),
        (["--mem", 0.001], "--mem 0.001 is below the least reachable"),
        (["--mem", 0.01, "--exclude", "conv*"], "2 layers left out by --exclude;"),
        (["--mem", 0.5, "--labels", "l.csv"], "--labels: are those of the data; give --data too"),
        (["--mem", 0.5, "--output", "y"], "--output: says how data is compared; give --data too"),
        (["--mem", 0.5, "--objective", "loss"], "give --data, or --objective weights"),
        (["--mem", 0.5, "--memory-limit", "2 TBs"], "--memory-limit 2 TBs: is not a number"),
        (["--mem", 0.5, "--profile", "a.json"], "give --latency or --measure-latency too"),
        (["--mem", 0.5, "--include", "nothing"], "--include 'nothing': matches no layer"),
        (["--mem", 0.5, "--data", "nowhere"], "--data nowhere: does not exist; check the path"),
        (["--mem", 0.5, "--input-shape", "x:1,4,20,20"], "--input-shape x:1,4,20,20: the model"),
        (["--max-drop", "1%"], "--max-drop: is measured on samples; give --data too"),
        (["--mem", 0.5, "--report", "a.txt"], "--report a.txt: its ending does not say"),
    ],
)
def test_the_command_line_names_flags(tmp_path, options, part):
    onnx.save(small_network(), tmp_path / "in.onnx")
    done = run_here(tmp_path / "in.onnx", tmp_path / "out.onnx", *options, "--threads", 1)
    assert done.returncode in (2, 3, 4)
    assert part in done.stderr
    assert not re.search(r"\b[a-z_]+=(?!\d)", done.stderr.partition(": ")[2])


def test_documents_have_flags_whoever_made_them(tmp_path):
    onnx.save(small_network(), tmp_path / "in.onnx")
    budgets = [Budget(mem=0.001), Budget(mem=0.6)]
    found = sweep(tmp_path / "in.onnx", budgets, threads=1, solver="milp")
    assert found.points[0].refused.startswith("--mem 0.001 is below the least reachable")
    assert np.isfinite(found.points[1].mem)
