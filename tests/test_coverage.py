"""Every module of the package is imported by its name in some test."""

from __future__ import annotations

import ast
from pathlib import Path

import cobla_onnx
from tests.test_imports import modules

TESTS = Path(__file__).parent


def imported(path: Path) -> set[str]:
    """Return modules that a file imports, and homes of the names it has from the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.name for alias in node.names}
            found |= {node.module, *(f"{node.module}.{name}" for name in names)}
            if node.module == "cobla_onnx":
                found |= {home for name, home in cobla_onnx._HOMES.items() if name in names}
    return {name.removeprefix("cobla_onnx.") for name in found}


def with_content(path: Path) -> bool:
    """Whether a module defines anything: not a room's door with a docstring alone."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not isinstance(node, ast.Expr) for node in body)


def test_every_module_is_imported_by_some_test():
    seen = set().union(*(imported(path) for path in TESTS.rglob("*.py")))
    wanted = {name for name, path in modules().items() if name and with_content(path)}
    assert "graph.layers" in wanted
    assert wanted - seen == set()
