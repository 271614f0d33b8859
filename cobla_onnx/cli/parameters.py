"""Options of `Settings` as parameters of commands, and those of the command line alone.

A command is decorated with `takes_options`: its parameter ``options`` stands for all options
that `Settings` has for it, in the form in which the Python API takes them.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from cobla_onnx import __version__
from cobla_onnx.cli import parsing
from cobla_onnx.cli.config import read_config
from cobla_onnx.options import settings
from cobla_onnx.options.declaring import Command, Flag, Group, Option
from cobla_onnx.wording import in_flags, option_name

__all__ = ["ExternalData", "Given", "Input", "Read", "Shown", "Version", "takes_options"]

# Options of a command as the Python API takes them.
Given = Mapping[str, Any]
# Files that are read beside the model, each with its option.
Read = Sequence[tuple[str, Path]]
GROUPS = typing.get_args(Group)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cobla-onnx {__version__}")
        raise typer.Exit


Input = Annotated[Path, typer.Argument(metavar="IN", help="The ONNX model.")]
ExternalData = Annotated[
    Literal["auto", "always", "never"],
    typer.Option(
        "--external-data",
        help="Weights in a file beside OUT; auto: as they were, or if over 2 GB.",
    ),
]
Version = Annotated[
    bool,
    typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
]


# Options that name a file to be read.
READ = ("config", "data", "labels", "plan_in")


@dataclass(frozen=True)
class Shown:
    """How a command shows its result, and how far it is; what every command has."""

    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, for scripts.")] = (
        False
    )
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--config",
            metavar="FILE.toml",
            callback=read_config,
            is_eager=True,
            help="Options from a file; those on the command line win.",
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print each stage with its time to stderr.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug", hidden=True)] = False


def takes_options(command: Command) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let typer see the options of a command where its function has them together.

    The parameter ``options`` stands for those of the table, and a parameter whose type is a
    dataclass for the fields of it. ``read`` gets the files that options name to be read.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        shared = _shared_options(command)
        places: dict[str, list[inspect.Parameter]] = {}
        together: dict[str, type] = {}
        for name, parameter in signature.parameters.items():
            if name == "options":
                places[name] = [_parameter(*flag) for option in shared for flag in option.flags]
            elif name == "read":
                places[name] = []
            elif isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation):
                together[name] = parameter.annotation
                places[name] = _own_parameters(parameter.annotation)
            else:
                places[name] = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]
        parameters = [parameter for place in places.values() for parameter in place]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            read = {"read": _files_read(values)} if "read" in places else {}
            for name, kind in together.items():
                values[name] = kind(**{one.name: values.pop(one.name) for one in places[name]})
            options = {option.name: option.take(values) for option in shared}
            function(**values, options=options, **read)

        run.__dict__["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _files_read(given: Mapping[str, Any]) -> Read:
    """Return the files that options name to be read, from their values as they were given."""
    named = ((name, given.get(name)) for name in READ)
    found = [(in_flags(option_name(name)), path) for name, path in named if path is not None]
    for name in ("include", "exclude"):
        files = (entry[1:] for entry in given.get(name) or () if entry.startswith("@"))
        found += [(in_flags(option_name(name)), Path(file)) for file in files]
    return found


def _own_parameters(declared: type) -> list[inspect.Parameter]:
    """Return the fields of a dataclass, annotated for typer, as parameters."""
    hints = typing.get_type_hints(declared, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(declared)
    ]


def _as_given(flag: str, value: Any) -> Any:
    return value


def _texts(flag: str, values: list[str]) -> tuple[str, ...]:
    return tuple(values)


@dataclass(frozen=True)
class _Form:
    """How values of a type are written on the command line, and read: ``read(flag, value)``."""

    type: Any
    repeated: bool = False
    read: Callable[[str, Any], Any] = _as_given


# By the type of the field, or by the first of these that is in its union.
FORMS: dict[Any, _Form] = {
    Any: _Form(Path),
    os.PathLike[str]: _Form(Path),
    Literal["auto"]: _Form(str, read=parsing.whole_or_auto),
    Mapping[str, Sequence[int]]: _Form(str, repeated=True, read=parsing.input_shapes),
    # Outputs; before names of layers, which are sequences alone.
    Mapping[str, str]: _Form(str, repeated=True, read=_texts),
    Sequence[str]: _Form(str, repeated=True, read=parsing.layer_names),
    tuple[float, ...]: _Form(str, read=parsing.numbers),
    tuple[int, ...]: _Form(str, read=parsing.word_or_wholes),
    **{plain: _Form(plain) for plain in (str, bool, int, float)},
}
# What is written in parts, and how it is put together from their values.
BUILDERS: dict[type, Callable[..., Any]] = {settings.ImageFlags: parsing.image_options}


def _form(hint: Any) -> _Form:
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    members = typing.get_args(hint) if union else (hint,)
    for known, form in FORMS.items():
        if known in members:
            return form
    if typing.get_origin(members[0]) is Literal:
        return _Form(members[0])
    raise TypeError(f"options of type {hint} cannot be written on the command line; see FORMS")


@dataclass(frozen=True)
class _Shared:
    """An option of the table, and the flags by which the command line has it.

    ``parts`` is the class whose fields the flags are, where they are more than one.
    """

    name: str
    flags: tuple[tuple[Field[Any], _Form], ...]
    parts: type | None

    def take(self, values: dict[str, Any]) -> Any:
        """Take the values of the flags out of a command's; return the option's."""
        taken = {}
        for field, form in self.flags:
            value = values.pop(field.name)
            flag = _flag(field).name
            taken[field.name] = field.default if value is None else form.read(flag, value)
        return taken[self.name] if self.parts is None else BUILDERS[self.parts](**taken)


def _shared_options(command: Command) -> list[_Shared]:
    """Return the options of the table that a command has, in the order of the help."""
    fields_by_group = sorted(
        settings.options_of(command), key=lambda field: GROUPS.index(_option(field).group)
    )
    shared = []
    for field in fields_by_group:
        parts = _option(field).parts
        if parts is not None:
            shared.append(_Shared(field.name, _with_forms(parts, fields(parts)), parts))
        elif field.metadata["flag"] is not None:
            shared.append(_Shared(field.name, _with_forms(settings.Settings, [field]), None))
    return shared


# A few milliseconds each.
_hints = functools.cache(typing.get_type_hints)


def _with_forms(
    declared: type, flags: Iterable[Field[Any]]
) -> tuple[tuple[Field[Any], _Form], ...]:
    hints = _hints(declared)
    return tuple((field, _form(hints[field.name])) for field in flags)


def _option(field: Field[Any]) -> Option:
    option: Option = field.metadata["option"]
    return option


def _flag(field: Field[Any]) -> Flag:
    flag: Flag = field.metadata["flag"]
    return flag


def _parameter(field: Field[Any], form: _Form) -> inspect.Parameter:
    flag = _flag(field)
    # What is a word or a number is written as a text, which has no limits.
    least, most = (None, None) if form.type is str else (flag.minimum, flag.maximum)
    default = None if form.repeated else field.default
    annotation: Any = types.GenericAlias(list, (form.type,)) if form.repeated else form.type
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(
            default, flag.name, metavar=flag.metavar, help=flag.help, min=least, max=most
        ),
        annotation=annotation if default is not None else annotation | None,
    )
