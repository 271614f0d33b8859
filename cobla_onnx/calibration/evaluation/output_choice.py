"""Parse the user's choice of outputs and of how each is compared: ``NAME=classes:1``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cobla_onnx.errors import UsageError
from cobla_onnx.text import quoted
from cobla_onnx.wording import option_name

__all__ = ["HOW", "LossName", "OutputChoice", "Outputs", "resolve_outputs"]

HOW = ("classes", "values", "ignore")

LossName: TypeAlias = Literal["auto", "kl", "mse", "ce"]
"""How outputs are compared with the original's, where nothing else is said of one."""

Outputs: TypeAlias = "str | Sequence[str] | Mapping[str, str]"
"""``NAME[=classes|values|ignore][:AXIS]`` for each output, or the part after = by name."""


@dataclass(frozen=True)
class OutputChoice:
    """The user's choice for one output.

    Attributes
    ----------
    name : str
    how : {'classes', 'values', 'ignore'} or None
        None if it counts, and evidence decides how.
    axis : int or None
        Axis of the classes, or of the features.
    """

    name: str
    how: str | None = None
    axis: int | None = None


def resolve_outputs(outputs: Outputs, names: Iterable[str]) -> dict[str, OutputChoice]:
    """Find the outputs that are meant; names may contain colons and equality signs.

    Parameters
    ----------
    outputs : str or sequence of str, or mapping of str to str
    names : iterable of str
        Outputs of the model. Where some are named without ``=``, the others do not count.

    Raises
    ------
    UsageError
        If there is no such output, or it is named twice.

    Examples
    --------
    >>> resolve_outputs(["y:0=classes:-1"], ["y:0", "z"])["y:0"]
    OutputChoice(name='y:0', how='classes', axis=-1)
    """
    known = list(names)
    entries = (
        [f"{name}={how}" for name, how in outputs.items()]
        if isinstance(outputs, Mapping)
        else [outputs]
        if isinstance(outputs, str)
        else list(outputs)
    )
    found: dict[str, OutputChoice] = {}
    for entry in entries:
        choice = _resolve(entry, known)
        if choice.name in found:
            raise UsageError(
                f"{option_name('outputs', entry)}: output {quoted(choice.name)} is named twice"
            )
        found[choice.name] = choice
    if any(choice.how is None for choice in found.values()):
        for name in known:
            found.setdefault(name, OutputChoice(name, "ignore"))
    return found


def _resolve(entry: str, known: Sequence[str]) -> OutputChoice:
    if entry in known:
        return OutputChoice(entry)
    match = re.fullmatch(r"(.*)=([a-z]+)(?::(-?\d{1,9}))?", entry, re.DOTALL)
    if match and match[2] in HOW:
        return _checked(entry, match[1], match[2], match[3], known)
    plain = re.fullmatch(r"(.*):(-?\d{1,9})", entry, re.DOTALL)
    if plain and plain[1] in known:
        return _checked(entry, plain[1], None, plain[2], known)
    if match and match[1] in known:
        raise UsageError(
            f"{option_name('outputs', entry)}: an output is not {quoted(match[2])}; write classes, "
            "values or ignore behind the ="
        )
    return _checked(entry, entry, None, None, known)


def _checked(
    entry: str, name: str, how: str | None, axis: str | None, known: Sequence[str]
) -> OutputChoice:
    if name not in known:
        close = difflib.get_close_matches(name, known, 3, 0.4) or list(known[:5])
        raise UsageError(
            f"{option_name('outputs', entry)}: the model has no output {quoted(name)}; did you "
            f"mean {', '.join(map(quoted, close))}?"
        )
    return OutputChoice(name, how, None if axis is None else int(axis))
