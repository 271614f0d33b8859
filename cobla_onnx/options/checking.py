"""Check values of options against their declarations: choices, kinds of numbers, and limits.

The command line does that by itself; this is for the Python API, where a value that means nothing
would otherwise be taken for another one, or end in an error of whatever reads it first.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from concurrent.futures import Executor
from numbers import Integral, Real
from typing import Any, Literal

from cobla_onnx.errors import UsageError
from cobla_onnx.options.declaring import Flag
from cobla_onnx.wording import option_name

__all__ = ["check_declared"]


def check_declared(declared: type, values: Mapping[str, object]) -> None:
    """Check values of options.

    Parameters
    ----------
    declared : type
        A dataclass with fields that were made by `option`.
    values : mapping of str to object
        By the names of the fields, of which some may be missing. Those whose types are not in the
        table here are left to who reads them.

    Raises
    ------
    UsageError
        If a value is none of its type, or beyond a limit.
    """
    hints = _hints(declared)
    for field in dataclasses.fields(declared):
        if field.name in values:
            value = values[field.name]
            wanted = _wanted(hints[field.name], value, field.metadata.get("flag"))
            if wanted is not None:
                raise UsageError(f"{option_name(field.name, value)}: give {wanted}")


def _wanted(hint: Any, value: object, flag: Flag | None) -> str | None:
    """Return what a value should be; None if it is that, or nobody knows."""
    said = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            choices = typing.get_args(member)
            # An array would be compared number by number.
            fits = isinstance(value, str) and value in choices
            said.append(" or ".join(filter(None, (", ".join(choices[:-1]), choices[-1]))))
        elif member is type(None):
            fits = value is None
        elif typing.get_origin(member) is Callable:
            fits = callable(value)
            said.append("a function")
        elif member in KINDS:
            kind, is_one = KINDS[member]
            fits = is_one(value) and not _is_beyond(value, flag)
            said.append(kind + (_limits(flag) if flag and member in (int, float) else ""))
        else:
            return None
        if fits:
            return None
    return ", or ".join(said)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value == value


def _are_texts(value: object) -> bool:
    if isinstance(value, str) or not isinstance(value, Collection):
        return False
    return all(isinstance(entry, str) for entry in value)


def _is_mapping_of_texts(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    return all(isinstance(each, str) for item in value.items() for each in item)


def _is_mapping_of_shapes(value: object) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return False
    shapes = list(value.values())
    if any(isinstance(shape, str) or not isinstance(shape, Sequence) for shape in shapes):
        return False
    return all(_is_whole(size) for shape in shapes for size in shape)


# What is asked for, and whether a value is one, by the type of the field.
KINDS: Mapping[Any, tuple[str, Callable[[object], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", _is_whole),
    float: ("a number", _is_number),
    str: ("a text", lambda value: isinstance(value, str)),
    os.PathLike[str]: ("a path", lambda value: isinstance(value, os.PathLike)),
    Mapping[str, str]: ("a mapping of texts, such as {'name': 'text'}", _is_mapping_of_texts),
    Mapping[str, Sequence[int]]: (
        "a mapping of names to shapes, such as {'name': (1, 3)}",
        _is_mapping_of_shapes,
    ),
    # Some clusters have one that is no subclass.
    Executor: (
        "an executor, such as concurrent.futures.ProcessPoolExecutor()",
        lambda value: callable(getattr(value, "submit", None)) and not isinstance(value, type),
    ),
    Sequence[str]: ("a list of texts, such as ['text']", _are_texts),
}


def _is_beyond(value: Any, flag: Flag | None) -> bool:
    if flag is None or not isinstance(value, Real):
        return False
    # As it is: no float holds some whole numbers.
    number: Any = value
    below = flag.minimum is not None and number < flag.minimum
    return bool(below or (flag.maximum is not None and number > flag.maximum))


def _limits(flag: Flag) -> str:
    if flag.minimum is None:
        return ""
    if flag.maximum is None:
        return f" of at least {flag.minimum:.0f}"
    return f" from {flag.minimum:.0f} to {flag.maximum:.0f}"


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the type itself."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


@functools.cache
def _hints(declared: Hashable) -> dict[str, Any]:
    """Return the types of a class's fields, which takes a few milliseconds."""
    return typing.get_type_hints(declared)
