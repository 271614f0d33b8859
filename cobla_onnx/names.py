"""Show names that come from a file: they may hold anything, so they all pass through here."""

from __future__ import annotations

import unicodedata

__all__ = ["quoted", "safe_text"]


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
