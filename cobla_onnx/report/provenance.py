"""The call or command that reproduces a result, as text to copy."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["call_text", "command_text"]


def command_text(arguments: Sequence[str]) -> str:
    """Format a command line, quoted for a POSIX shell.

    Parameters
    ----------
    arguments : sequence of str
        As in ``sys.argv``; of the program, which comes first, only the name is shown.

    Examples
    --------
    >>> command_text(["/usr/bin/cobla-onnx", "my model.onnx", "out.onnx", "--mem", "0.3"])
    "cobla-onnx 'my model.onnx' out.onnx --mem 0.3"
    """
    program = os.path.basename(arguments[0]) if arguments else ""
    if program in ("", "__main__.py"):
        return shlex.join(["python", "-m", "cobla_onnx", *arguments[1:]])
    return shlex.join([program, *arguments[1:]])


def call_text(function: Callable[..., Any], values: Mapping[str, Any]) -> str:
    """Write a call down, without the arguments that have their default or no value.

    Objects that cannot be written as a literal are written as ``<their type>``.

    Examples
    --------
    >>> def compress(model, budget, *, seed=0, data=None): ...
    >>> call_text(compress, {"model": "a.onnx", "budget": 0.5, "seed": 0, "data": object()})
    "compress('a.onnx', 0.5, data=<object>)"
    """
    shown = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = values.get(name, parameter.default)
        if parameter.default is inspect.Parameter.empty:
            shown.append(_literal(value))
        elif value is not parameter.default and _literal(value) != _literal(parameter.default):
            shown.append(f"{name}={_literal(value)}")
    return f"{function.__name__}({', '.join(shown)})"


def _literal(value: Any) -> str:
    if isinstance(value, os.PathLike):
        return repr(os.fspath(value))
    if isinstance(value, (list, tuple)) and len(value) <= 20:
        inside = ", ".join(map(_literal, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, dict) and len(value) <= 20:
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    plain = isinstance(value, (str, int, float)) or value is None
    # Dataclasses of this package, such as Budget, are written as constructor calls.
    ours = type(value).__module__.startswith("cobla_onnx.") and len(repr(value)) <= 300
    return repr(value) if plain or ours else f"<{type(value).__name__}>"
