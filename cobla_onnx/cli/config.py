"""``--config FILE.toml``: options from a file, which those on the command line overrule.

Keys are options without their dashes. Those at the top go to every command that has them,
those in a table named like a command, ``[sweep]``, to that one.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from cobla_onnx.errors import UsageError
from cobla_onnx.text import first_line, quoted, safe_text

__all__ = ["read_config"]

# Options that make no sense in a file.
NOT_IN_FILE = {"config", "help", "version", "debug"}


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options of a file the defaults of a command; a callback of ``--config``.

    Raises
    ------
    UsageError
        If the file cannot be read, or has an unknown option, or a value that does not fit.
    """
    if path is None or context.resilient_parsing:
        return path
    shown = safe_text(str(path), 300)
    content = _load(path, shown)
    commands = _commands(context)
    name = context.command.name or ""
    own = _options(context.command)
    everywhere = {key for command in commands.values() for key in _options(command)}
    values: dict[str, Any] = {}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    for table, entries in tables.items():
        if table not in commands:
            raise _unknown(shown, f"table [{table}]", table, commands)
        known = _options(commands[table])
        for key in entries:
            if _plain(key) not in known:
                raise _unknown(shown, f"[{table}] {key}", _plain(key), known)
    top = {_plain(key): value for key, value in content.items() if key not in tables}
    for key in top:
        if key not in everywhere:
            raise _unknown(shown, key, key, everywhere)
    chosen = {**top, **{_plain(k): v for k, v in tables.get(name, {}).items()}}
    for key, value in chosen.items():
        if key in own:
            option = own[key]
            values[option.name] = _value(shown, key, value, option)
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _load(path: Path, shown: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        # Some editors write a byte-order mark first.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {shown}: cannot be read ({error}); check the path") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"--config {shown}: is not TOML: {error}; mend that line") from error
    except (ValueError, RecursionError) as error:
        # Of what is TOML and beyond Python: numbers of thousands of digits, lists in lists.
        raise UsageError(
            f"--config {shown}: cannot be read ({first_line(error)}); no option takes so much, "
            "write less"
        ) from error


def _commands(context: typer.Context) -> Mapping[str, Any]:
    parent = context.parent
    commands: Mapping[str, Any] = getattr(parent.command, "commands", {}) if parent else {}
    return commands or {context.command.name or "": context.command}


def _plain(key: str) -> str:
    return key.replace("_", "-")


def _options(command: Any) -> dict[str, Any]:
    """Options of a command by their names without dashes."""
    found = {}
    for parameter in command.params:
        if parameter.param_type_name == "option":
            long = [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]
            found.update({name: parameter for name in long if name not in NOT_IN_FILE})
    return found


def _unknown(shown: str, where: str, key: str, known: Iterable[str]) -> UsageError:
    close = difflib.get_close_matches(key, list(known), 1)
    hint = f"did you mean {close[0]!r}?" if close else "see --help for the options"
    return UsageError(f"--config {shown}: {quoted(where)} is not an option; {hint}")


def _value(shown: str, key: str, value: Any, option: Any) -> Any:
    """Return a value as the command line would give it."""
    flag = bool(getattr(option, "is_flag", False))
    if flag:
        if isinstance(value, bool):
            return value
        raise UsageError(f"--config {shown}: {key} is on or off; write true or false")
    items = value if isinstance(value, list) and option.multiple else [value]
    if not all(
        isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items
    ):
        wanted = "texts or numbers, one or a list" if option.multiple else "a text or a number"
        raise UsageError(f"--config {shown}: {key} takes {wanted}; see --help")
    try:
        texts = [item if isinstance(item, str) else repr(item) for item in items]
    except ValueError as error:
        # TOML has hexadecimal numbers, whose digits Python does not count before it writes them.
        raise UsageError(f"--config {shown}: {key} has too many digits; see --help") from error
    return texts if option.multiple else texts[0]
