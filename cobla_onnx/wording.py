"""Name options in messages: as arguments in Python, as flags on the command line.

Messages are written where a mistake is found, which is below both. An option stands in them in
both spellings, between characters that no safe name holds (`text.safe_text` escapes them), and
whoever shows a message chooses: ``str()`` of an error Python's, the command line its own.
Documents, which are reports, tables and their notes, have flags, whoever made them: the same
options give the same bytes, and a report that is handed on refers to one spelling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["either", "in_flags", "in_python", "option_name"]

# Private-use characters, which mean nothing elsewhere.
START, MIDDLE, END = "\ue000", "\ue001", "\ue002"
BOTH = re.compile(f"{START}([^{START}{MIDDLE}{END}]*){MIDDLE}([^{START}{MIDDLE}{END}]*){END}")
# Flags that are not the argument's name with dashes: singular where they are given repeatedly.
FLAGS = {"input_shapes": "--input-shape", "outputs": "--output", "plan": "--plan-in"}


def option_name(name: str, value: Any = None) -> str:
    """Name an option, with a value or alone, for a message.

    Parameters
    ----------
    name : str
        The argument in Python; its flag is that with dashes, but for those in `FLAGS`.
    value : object, optional
        A mapping stands for a flag for each entry, ``NAME:1,3`` or ``NAME=text``; True for a
        switch, which is a flag without a value.

    Examples
    --------
    >>> shapes = option_name("input_shapes", {"x": (1, 3)})
    >>> message = f"raise {option_name('mem')}, or give {shapes}"
    >>> in_python(message)
    "raise mem=, or give input_shapes={'x': (1, 3)}"
    >>> in_flags(message)
    'raise --mem, or give --input-shape x:1,3'
    """
    flag = FLAGS.get(name, f"--{name.replace('_', '-')}")
    if value is None:
        return either(python=f"{name}=", command=flag)
    if value is True:
        command = flag
    elif isinstance(value, Mapping):
        command = ", ".join(f"{flag} {_entry(key, item)}" for key, item in value.items())
    else:
        command = f"{flag} {_for_command(value)}"
    return either(python=f"{name}={_for_python(value)}", command=command)


def either(*, python: str, command: str) -> str:
    """Stand for one text in Python, and for another on the command line."""
    return f"{START}{python}{MIDDLE}{command}{END}"


def in_python(message: str) -> str:
    """Choose Python's spelling; before a colon an argument has its name alone.

    Examples
    --------
    >>> in_python(f"{option_name('labels')}: are those of the data; give {option_name('data')} too")
    'labels: are those of the data; give data= too'
    """

    def spell(found: re.Match[str]) -> str:
        before_colon = message[found.end() : found.end() + 1] == ":"
        return found[1].removesuffix("=") if before_colon else found[1]

    return BOTH.sub(spell, message)


def in_flags(message: str) -> str:
    """Choose the spelling of the command line."""
    return BOTH.sub(lambda found: found[2], message)


def _entry(key: str, value: Any) -> str:
    return f"{key}={value}" if isinstance(value, str) else f"{key}:{_for_command(value)}"


def _for_command(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_for_command(item) for item in value)
    return str(value)


def _for_python(value: Any) -> str:
    if isinstance(value, Mapping):
        entries = (f"{key!r}: {_for_python(item)}" for key, item in value.items())
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        # An unknown size is "?", and no text.
        items = [item if item == "?" else _for_python(item) for item in value]
        return f"({', '.join(items)}{',' * (len(items) == 1)})"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, int) else repr(str(value))
