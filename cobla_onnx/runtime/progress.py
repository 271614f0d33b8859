"""Callbacks with which the stages of a run report their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeVar

__all__ = ["Progress", "silent", "tracked"]

Result = TypeVar("Result")

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the name of a stage, the steps done and their number.

Behind a colon the name may tell how it stands, such as the loss reached.
"""


def silent(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


def tracked(
    results: Iterable[Result], total: int, progress: Callable[[int, int], None]
) -> Iterator[Result]:
    """Yield results, and tell how many of them are done, from before the first one on."""
    progress(0, total)
    for done, result in enumerate(results, 1):
        yield result
        progress(done, total)
