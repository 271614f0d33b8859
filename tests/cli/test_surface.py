"""Help texts and signatures stay as they are, unless the stored ones are changed too.

`help/NAME.txt` is what ``COLUMNS=80 NO_COLOR=1 cobla-onnx NAME --help`` prints.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

import cobla_onnx
from cobla_onnx import __main__
from cobla_onnx.cli import app
from cobla_onnx.cli.commands import advise, compare, compress, sweep
from cobla_onnx.cli.commands import inspect as inspection
from cobla_onnx.cli.config import NOT_IN_FILE
from tests.cli.test_command import run_here

HERE = Path(__file__).parent
COMMANDS = ("compress", "advise", "inspect", "sweep", "compare")
WRITTEN_WITH = "0.29."


def words(text: str) -> list[str]:
    """Return words of the options: versions of typer put types and limits in other brackets."""
    plain = re.sub(r"[][<>{}\\]", "", text.partition("Options:\n")[2]).lower()
    return plain.replace("integer", "int").split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_written_down(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    app([command, "--help"], prog_name="cobla-onnx", standalone_mode=False)
    shown = capsys.readouterr().out
    stored = (HERE / "help" / f"{command}.txt").read_text(encoding="utf-8")
    assert words(shown) == words(stored)
    if importlib.metadata.version("typer").startswith(WRITTEN_WITH):
        assert shown == stored


def test_each_command_has_a_module_of_its_own():
    modules = (compress, advise, inspection, sweep, compare)
    assert [command.callback.__module__ for command in app.registered_commands] == [
        module.__name__ for module in modules
    ]
    assert __main__.main.__module__ == "cobla_onnx.cli.app"


@pytest.mark.parametrize("key", sorted(NOT_IN_FILE))
def test_what_makes_no_sense_in_a_file_is_no_option_there(tmp_path, key):
    (tmp_path / "c.toml").write_text(f"{key} = true\n")
    done = run_here("compress", "--config", tmp_path / "c.toml", "in.onnx", "out.onnx")
    assert done.returncode == 2
    assert f"'{key}' is not an option" in done.stderr


def test_signatures_are_as_written_down():
    functions = ("advise", "compare", "compress", "inspect", "sweep")
    found = [f"{name}{inspect.signature(getattr(cobla_onnx, name))}\n" for name in functions]
    assert "".join(found) == (HERE / "signatures.txt").read_text(encoding="utf-8")
