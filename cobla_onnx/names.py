"""Show names that come from a file, which may hold anything, and find those that a user means."""

from __future__ import annotations

import fnmatch
import unicodedata
from collections.abc import Collection

__all__ = ["matching", "quoted", "safe_text"]


def safe_text(text: str, limit: int = 48) -> str:
    r"""Make a text safe to show: no control characters, no more than `limit` characters.

    Examples
    --------
    >>> safe_text("a" + chr(27) + "[31m")
    'a\\x1b[31m'
    """
    shown = "".join(
        c if not unicodedata.category(c).startswith(("C", "Zl", "Zp")) else f"\\x{ord(c):02x}"
        for c in text[: 4 * limit]
    )
    return shown if len(shown) <= limit else f"{shown[: limit // 2 - 1]}…{shown[-limit // 2 :]}"


def quoted(name: str) -> str:
    """Return a name in quotes, for a message.

    Examples
    --------
    >>> quoted("conv1")
    "'conv1'"
    """
    return f"'{safe_text(name, 80)}'"


def matching(pattern: str, names: Collection[str]) -> set[str]:
    """Names that a user means: the very name if there is one, else those that a glob matches.

    Examples
    --------
    >>> matching("blocks[0]/fc", ["blocks[0]/fc", "blocks0/fc"])
    {'blocks[0]/fc'}
    >>> matching("blocks[0]/fc", ["blocks0/fc"])
    {'blocks0/fc'}
    """
    if pattern in names:
        return {pattern}
    return {name for name in names if fnmatch.fnmatchcase(name, pattern)}
