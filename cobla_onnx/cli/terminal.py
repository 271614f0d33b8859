"""What people see: tables on stdout, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cobla_onnx.progress import Progress

__all__ = ["progress", "result", "show"]


@contextmanager
def progress(quiet: bool) -> Iterator[Progress | None]:
    """Show a bar on stderr while a stage runs, if somebody watches."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            name = stage.partition(":")[0]
            if name not in tasks:
                tasks[name] = bar.add_task(stage, total=total)
            bar.update(tasks[name], description=stage, completed=done, total=total)

        yield advance


class Result(Protocol):
    """What commands come to: rich renders it, and it can be written as JSON."""

    def to_json(self) -> str:
        """Return it as JSON."""

    def __rich__(self) -> RenderableType: ...


def result(found: Result, *, json: bool, quiet: bool) -> None:
    """Print what a command came to: JSON for scripts, a table for people, or nothing."""
    if json:
        sys.stdout.write(found.to_json() + "\n")
    elif not quiet:
        show(found)


def show(renderable: Any) -> None:
    """Print something that rich can render, in 80 columns where there is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=80)
    console.print(renderable)
