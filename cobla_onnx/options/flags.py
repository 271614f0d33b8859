"""Options as a person would type them: what was given to one command, for another."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cobla_onnx.options.declaring import Command, Flag
from cobla_onnx.options.settings import Settings, options_of

__all__ = ["typed_options"]


def typed_options(settings: Settings, given: Command, wanted: Command) -> str:
    """Write the options of layers and data that were given to a command, for another one.

    Those are left out that only say how much work is done and how (``--samples``, ``--threads``),
    ``--data`` itself, and what Python alone can give, such as arrays of labels.

    Parameters
    ----------
    settings : Settings
    given, wanted : str
        The command that the settings are of, and the one that the text is for.

    Returns
    -------
    str
        Quoted for a shell, in front of each option a blank; empty if all have their defaults.

    Examples
    --------
    >>> settings = Settings(exclude=("a b", "c"), deduplicate=False)
    >>> typed_options(settings, "advise", "compress")
    " --exclude 'a b' --exclude c --no-deduplicate"
    """
    words: list[str] = []
    for field in options_of(given):
        option = field.metadata["option"]
        if wanted in option.commands and option.group in ("data", "layers"):
            words.extend(_words(field, getattr(settings, field.name)))
    return "".join(f" {shlex.quote(word)}" for word in words)


# What stands on the command line as one flag for each entry.
MAPPINGS = ("input_shapes", "outputs")
# They are of the work, and of what the suggestion says itself.
LEFT_OUT = ("data", "samples", "batch", "memory_limit", "refit", "distil", "augment")


def _words(field: dataclasses.Field[Any], value: Any) -> Iterator[str]:
    # Arrays of labels do not compare as a whole.
    unchanged = type(value) is type(field.default) and value == field.default
    if field.name in LEFT_OUT or unchanged:
        return
    if (parts := field.metadata["option"].parts) is not None:
        for part in dataclasses.fields(parts):
            found = getattr(value, part.name)
            # The flags leave out what ImageOptions has a default for.
            if found != getattr(type(value)(), part.name):
                yield from (part.metadata["flag"].name, _text(found))
        return
    flag: Flag = field.metadata["flag"]
    if isinstance(value, bool):
        yield flag.name.partition("/")[0 if value else 2]
    elif isinstance(value, Mapping):
        if field.name not in MAPPINGS:
            return
        for name, entry in value.items():
            # A shape, or how an output counts.
            joint = "=" if isinstance(entry, str) else ":"
            yield from (flag.name, f"{name}{joint}{_text(entry)}")
    elif isinstance(value, str | os.PathLike | int | float):
        yield from (flag.name, str(value))
    elif isinstance(value, Sequence) and all(isinstance(entry, str) for entry in value):
        for entry in value:
            yield from (flag.name, entry)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return ",".join(map(_text, value))
    return repr(value)
