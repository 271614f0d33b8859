"""What people see: tables on stdout, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cobla_onnx.progress import Progress

__all__ = ["progress", "show"]


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


def show(renderable: Any) -> None:
    """Print something that rich can render."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        # A pipe has no width: wide enough that no column is cut.
        console = Console(width=160)
    console.print(renderable)
