"""Options are written once: all places that show or take them agree with the table."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest
import typer.main

import cobla_onnx
from cobla_onnx.calibration.data.images import ImageOptions
from cobla_onnx.cli import app, parameters
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.io.save import ExternalData
from cobla_onnx.options import Settings
from cobla_onnx.options.declaring import Command, option
from cobla_onnx.options.settings import ANALYSE, SEARCH, ImageFlags, options_of
from cobla_onnx.options.signatures import InspectOptions, SearchOptions, takes_options
from cobla_onnx.variants.low_rank import ranks

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = typing.get_args(Command)


@dataclasses.dataclass(frozen=True)
class More(Settings):
    """The options, and a new one: a field and nothing else."""

    toy: int = option(ANALYSE, "speed", 3, "--toy", "Play.", "N", minimum=1)


@pytest.fixture
def one_more(monkeypatch):
    """Make commands from the table with the new option; what they open tells its value."""

    def opened(model, settings, **_):
        raise UsageError(f"toy is {settings.toy}")

    pipeline = importlib.import_module("cobla_onnx.pipeline.inspect")
    monkeypatch.setattr(cobla_onnx.options.settings, "Settings", More)
    monkeypatch.setattr(pipeline, "Settings", More)
    monkeypatch.setattr(pipeline, "open_session", opened)
    made = typer.Typer(rich_markup_mode=None)
    for command in COMMANDS:
        module = importlib.import_module(f"cobla_onnx.cli.commands.{command}")
        plain = getattr(module, command).__wrapped__
        made.command(command)(parameters.takes_options(command)(plain))
    return lambda *arguments: made(map(str, arguments), standalone_mode=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_shows_a_new_option_where_it_belongs(one_more, command, capsys):
    one_more(command, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert ("--toy" in text) == (command in ANALYSE)
    if command in ANALYSE:
        # After the others of its group.
        later = "--measure-latency .*" if command in SEARCH else ""
        assert re.search(later + r"--toy N Play\. \W*default: 3; x>=1\] --(seed|threads)", text)


def test_a_new_option_reaches_the_settings(one_more, tmp_path):
    config = tmp_path / "toy.toml"
    config.write_text("toy = 7\n")
    asked = {3: [], 5: ["--toy", 5], 7: ["--config", config], 8: ["--config", config, "--toy", 8]}
    for value, arguments in asked.items():
        with pytest.raises(UsageError, match=f"^toy is {value}$"):
            one_more("inspect", "a.onnx", *arguments)
    with pytest.raises(UsageError, match=r"^toy is 9$"):
        cobla_onnx.inspect("a.onnx", toy=9)


def test_a_new_option_stands_in_signatures(one_more):
    @takes_options("inspect")
    def look(model: str, **options: object) -> None: ...

    assert str(inspect.signature(look).parameters["toy"]) == "toy: 'int' = 3"


def flags(command: str) -> dict[str, typing.Any]:
    """Return a command's options by the flag that changes the default, but the hidden ones."""
    found = typer.main.get_command(app).commands[command].params
    return {
        name: parameter
        for parameter in found
        if parameter.param_type_name == "option" and not parameter.hidden
        for name in (parameter.opts if parameter.default is not True else parameter.secondary_opts)
        if name.startswith("--") and name != "--help"
    }


def documented_options() -> dict[str, str]:
    """Return flags of the documentation's table with what it says of their values."""
    text = (ROOT / "docs/commands/compress.md").read_text(encoding="utf-8")
    table = text.partition("<!-- options -->")[2].partition("<!-- end of options -->")[0]
    cells = re.findall(r"^\| (`--.*?) \| ", table, re.MULTILINE)
    spans = [span for cell in cells for span in re.findall(r"`([^`]*)`", cell)]
    return {flag: value for flag, _, value in (span.partition(" ") for span in spans)}


def test_the_table_of_options_has_the_options_of_the_main_command():
    assert set(documented_options()) == set(flags("compress"))


def test_the_table_of_options_has_their_choices():
    said = documented_options()
    hints = typing.get_type_hints(Settings)
    choices = {"--external-data": typing.get_args(ExternalData)}
    for field in options_of("compress"):
        if typing.get_origin(hints[field.name]) is typing.Literal:
            choices[field.metadata["flag"].name] = typing.get_args(hints[field.name])
    assert len(choices) == 7
    assert {flag: said[flag] for flag in choices} == {
        flag: "\\|".join(names) for flag, names in choices.items()
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_pages_of_commands_include_their_help_and_name_flags_that_exist(command):
    text = (ROOT / "docs" / "commands" / f"{command}.md").read_text(encoding="utf-8")
    assert f"```{{literalinclude}} ../_generated/{command}.txt" in text
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= {flag for name in COMMANDS for flag in flags(name)}


def test_help_is_generated_for_all_commands():
    source = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    listed = re.search(r"^COMMANDS = \((.*)\)$", source, re.MULTILINE)
    assert listed is not None
    commands = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"\w+", listed[1])) == commands == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_functions_have_the_options_of_the_table(command):
    signature = inspect.signature(getattr(cobla_onnx, command))
    wanted = {field.name: (field.type, field.default) for field in options_of(command)}
    found = {
        name: (parameter.annotation, parameter.default)
        for name, parameter in signature.parameters.items()
        if name in wanted
    }
    assert list(found.items()) == list(wanted.items())
    own = {"budget", "max_drop", "plan", "budgets", "external_data", "sensitivity"}
    own |= {"out_dir", "report", "compare_with"}
    assert set(signature.parameters) - set(wanted) <= {"model", "first", "second"} | own


@pytest.mark.parametrize("command", COMMANDS)
def test_functions_describe_their_parameters(command):
    function = getattr(cobla_onnx, command)
    section = inspect.getdoc(function).partition("Parameters\n----------\n")[2]
    heads = re.findall(r"^\w.*$", re.split(r"\n\n(?=\w+\n-+\n)", section)[0], re.MULTILINE)
    described = [name for head in heads for name in re.findall(r"\w+", head.partition(" :")[0])]
    assert sorted(described) == sorted(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("command", "keywords"),
    [("inspect", InspectOptions), ("compress", SearchOptions), ("sweep", SearchOptions)],
)
def test_type_checkers_see_the_types_of_the_table(command, keywords):
    # In 3.14 an annotation is a text again only where it is asked for.
    said = {name: _text(hint) for name, hint in keywords.__annotations__.items()}
    assert said == {field.name: field.type for field in options_of(command)}


def _text(hint: typing.Any) -> str:
    return getattr(hint, "__forward_arg__", hint)


def test_images_have_the_fields_of_their_options():
    real = {field.name: field for field in dataclasses.fields(ImageOptions)}
    assert list(real) == [field.name for field in dataclasses.fields(ImageFlags)]
    for field in dataclasses.fields(ImageFlags):
        assert field.type.removesuffix(" | None") == real[field.name].type
        assert field.default in (None, real[field.name].default)


def test_types_that_are_written_a_second_time_are_the_same():
    """The command line cannot import them: their modules take a second to load."""
    assert typing.get_args(parameters.ExternalData)[0] == ExternalData
    assert typing.get_type_hints(Settings)["rank_multiple"] == eval(
        ranks.RankMultiple, vars(typing)
    )


@pytest.mark.parametrize(
    ("command", "given"),
    [("inspect", {"solver": "milp"}), ("compress", {"call": "me"}), ("sweep", {"toy": 1})],
)
def test_an_option_that_a_function_lacks_is_an_error(command, given):
    with pytest.raises(
        TypeError, match=f"{command}.. got an unexpected keyword .*{next(iter(given))}"
    ):
        Settings.of(command, given)


def test_options_of_a_type_that_cannot_be_written_are_refused():
    with pytest.raises(TypeError, match="cannot be written on the command line"):
        parameters._form(complex)
