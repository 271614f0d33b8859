"""Rooms import what stands below them, and nothing else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cobla_onnx

PACKAGE = Path(cobla_onnx.__file__).parent
# From the top; those on one line do not import each other.
STOREYS = (
    ("__main__",),
    ("cli",),
    ("pipeline",),
    ("options",),
    ("report",),
    ("latency", "distillation"),
    ("arithmetic",),
    ("plan",),
    ("variants",),
    ("calibration", "allocation"),
    ("autodiff",),
    ("runtime",),
    ("graph",),
    ("errors", "text"),
    ("wording",),
)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if _inner(f"{base}.{alias.name}") in known else base
                for alias in node.names
            ]
        else:
            continue
        yield from (_inner(name) for name in names if name.startswith("cobla_onnx."))


def _inner(name: str) -> str:
    return name.removeprefix("cobla_onnx.")


def storey(module: str) -> int:
    room = module.partition(".")[0]
    return next(number for number, rooms in enumerate(STOREYS) if room in rooms)


def wrong_ways(files: dict[str, Path]) -> set[tuple[str, str]]:
    """Pairs of modules of which one imports the other from below, or from beside."""
    found = set()
    for module, path in files.items():
        # Names of the package itself are imported lazily.
        if not module:
            continue
        for other in imported(path, set(files)):
            rooms = module.partition(".")[0], other.partition(".")[0]
            if rooms[0] != rooms[1] and storey(module) >= storey(other):
                found.add((module, other))
    return found


def test_rooms_import_what_stands_below_them():
    assert wrong_ways(modules()) == set()


def test_a_wrong_import_is_noticed(tmp_path):
    files = modules()
    wrong = tmp_path / "macs.py"
    wrong.write_text("def late():\n    from cobla_onnx.report import model\n")
    files["graph.macs"] = wrong
    assert ("graph.macs", "report.model") in wrong_ways(files)


def test_the_root_has_no_more_than_six_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
