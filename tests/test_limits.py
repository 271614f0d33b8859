"""Modules and functions stay short enough to be read at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_imports import modules

MODULE_LINES, FUNCTION_LINES, PARAMETERS = 400, 80, 12
# The public API: parameters are the options of the commands.
PUBLIC = {
    f"{room}.{name}"
    for room in ("pipeline", "cli.commands")
    for name in ("compress", "sweep", "compare")
}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Number of parameters, without the object that a method belongs to."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    own = bool(names) and names[0] in ("self", "cls")
    return len(names) - own + (given.vararg is not None) + (given.kwarg is not None)


def beyond(source: str, module: str) -> list[str]:
    """What of a module is over the limits, in words."""
    public = module.rpartition(".")[2] if module in PUBLIC else ""
    found = []
    if (lines := len(source.splitlines())) > MODULE_LINES:
        found.append(f"{lines} lines")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name == public:
            continue
        assert node.end_lineno is not None
        if (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
            found.append(f"{node.name}: {lines} lines")
        if (count := parameters(node)) > PARAMETERS:
            found.append(f"{node.name}: {count} parameters")
    return found


@pytest.mark.parametrize(("module", "path"), modules().items(), ids=modules())
def test_modules_and_functions_are_short(module: str, path: Path) -> None:
    assert beyond(path.read_text(encoding="utf-8"), module) == []


def test_the_public_functions_are_where_they_are_looked_for() -> None:
    assert modules().keys() >= PUBLIC


def function(lines: int, count: int, name: str = "long") -> str:
    names = ", ".join(f"p{i}" for i in range(count))
    return f"def {name}({names}):\n" + "    pass\n" * (lines - 1)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 1\n" * 400, []),
        ("x = 1\n" * 401, ["401 lines"]),
        (function(80, 12), []),
        (function(81, 12), ["long: 81 lines"]),
        (function(2, 13), ["long: 13 parameters"]),
        ("async " + function(81, 0), ["long: 81 lines"]),
        ("def f(a, b, /, c, d, e, *f, g, h, i, j, k, l, **m): ...\n", ["f: 13 parameters"]),
        ("class A:\n  def f(self, a, b, c, d, e, f, g, h, i, j, k, l): ...\n", []),
        ("class A:\n  def f(cls, a, b, c, d, e, f, g, h, i, j, k, l): ...\n", []),
        (
            "class A:\n  def f(self, a, b, c, d, e, f, g, h, i, j, k, l, m): ...\n",
            ["f: 13 parameters"],
        ),
        ("def outer():\n" + "  x = 1\n" * 80, ["outer: 81 lines"]),
    ],
)
def test_what_is_over_a_limit_is_noticed(source: str, found: list[str]) -> None:
    assert beyond(source, "graph.macs") == found


def test_only_the_public_function_itself_may_be_long() -> None:
    source = function(81, 13, "compress") + function(81, 0, "further")
    assert beyond(source, "pipeline.compress") == ["further: 81 lines"]
    assert beyond(function(81, 13, "compress"), "pipeline.session") == [
        "compress: 81 lines",
        "compress: 13 parameters",
    ]
