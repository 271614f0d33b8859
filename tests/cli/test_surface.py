"""Help texts and signatures stay as they are, unless the stored ones are changed too.

`help/NAME.txt` is what ``COLUMNS=80 NO_COLOR=1 cobla-onnx NAME --help`` prints.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from pathlib import Path

import pytest

import cobla_onnx
from cobla_onnx.cli import app

HERE = Path(__file__).parent
COMMANDS = ("compress", "inspect", "sweep", "compare")
# Versions of typer write types of values in other brackets.
WRITTEN_WITH = "0.29."


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_written_down(command, monkeypatch, capsys):
    if not importlib.metadata.version("typer").startswith(WRITTEN_WITH):
        pytest.skip(f"the help texts are those of typer {WRITTEN_WITH}x")
    monkeypatch.setenv("COLUMNS", "80")
    app([command, "--help"], prog_name="cobla-onnx", standalone_mode=False)
    shown = capsys.readouterr().out
    assert shown == (HERE / "help" / f"{command}.txt").read_text(encoding="utf-8")


def test_signatures_are_as_written_down():
    functions = ("compare", "compress", "inspect", "sweep")
    found = [f"{name}{inspect.signature(getattr(cobla_onnx, name))}\n" for name in functions]
    assert "".join(found) == (HERE / "signatures.txt").read_text(encoding="utf-8")
