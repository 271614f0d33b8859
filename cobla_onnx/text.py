"""Show names and errors that come from a file or a library, and find names that a user means."""

from __future__ import annotations

import fnmatch
import itertools
import math
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

__all__ = ["finite", "first_line", "matching", "numbered", "quoted", "safe_text", "short_names"]

# Characters of a text that are looked at.
LONGEST = 10_000


def safe_text(text: str, limit: int = 48) -> str:
    r"""Make a text safe to show: no control characters, no more than `limit` characters.

    Examples
    --------
    >>> safe_text("a" + chr(27) + "[31m")
    'a\\x1b[31m'
    """
    shown = _printable(text)
    return shown if len(shown) <= limit else _elided(shown, limit, limit // 2 - 1)


def short_names(names: Iterable[str], limit: int) -> dict[str, str]:
    """Make the names of a table safe and short, so that different ones stay different.

    The middle is left out where that tells them apart, else what comes before or after the
    place where they begin to differ; names that differ in more places are numbered.

    Examples
    --------
    >>> names = [f"encoder/layer.{i}/attention/self/query" for i in (1, 2)]
    >>> list(short_names(names, 20).values())
    ['encoder/layer.1…uery', 'encoder/layer.2…uery']
    """
    found: dict[str, str] = {}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[safe_text(name, limit)].append(name)
    taken = set(groups)
    for usual, alike in groups.items():
        if len(alike) == 1:
            found[alike[0]] = usual
            continue
        for shown in _tries([_printable(name) for name in alike], limit):
            if len(set(shown)) == len(shown) and not taken & set(shown):
                found.update(zip(alike, shown, strict=True))
                taken.update(shown)
                break
    return found


def _tries(names: Sequence[str], limit: int) -> Iterator[list[str]]:
    """Yield ways to shorten names that the usual way makes alike."""
    half = limit // 2 - 1
    for head in sorted(range(1, limit - 1), key=lambda head: abs(head - half)):
        yield [_elided(name, limit, head) for name in names]
    same = itertools.takewhile(lambda chars: len(set(chars)) == 1, zip(*names, strict=False))
    start = max(sum(1 for _ in same) - limit // 4, 0)
    yield [f"…{name[start : start + limit - 2]}…"[:limit] for name in names]
    for number in itertools.count(1):
        ends = [f"…{number + place}" for place in range(len(names))]
        yield [
            name[: max(limit - len(end), 1)] + end for name, end in zip(names, ends, strict=True)
        ]


def _printable(text: str) -> str:
    # As nearly all names are: some are made safe for messages that are then never shown.
    if text.isascii() and text.isprintable():
        return text[:LONGEST]
    return "".join(
        c if not unicodedata.category(c).startswith(("C", "Zl", "Zp")) else f"\\x{ord(c):02x}"
        for c in text[:LONGEST]
    )


def _elided(text: str, limit: int, head: int) -> str:
    return text if len(text) <= limit else f"{text[:head]}…{text[head + 1 - limit :]}"


def quoted(name: str) -> str:
    """Return a name in quotes, for a message.

    Examples
    --------
    >>> quoted("conv1")
    "'conv1'"
    """
    return f"'{safe_text(name, 80)}'"


def first_line(error: Exception) -> str:
    """First line of an error's text, cut to a readable length."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def finite(value: float) -> float | None:
    """Return a number, or None where JSON could not express it."""
    return value if math.isfinite(value) else None


def numbered(count: int, noun: str, ending: str = "s") -> str:
    """Return a number with its noun, in the plural unless it is one.

    Examples
    --------
    >>> numbered(1, "pass", "es"), numbered(2, "pass", "es")
    ('1 pass', '2 passes')
    """
    return f"{count} {noun}{'' if count == 1 else ending}"


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
