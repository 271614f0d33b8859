"""What people see: results on stdout, progress on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cobla_onnx.runtime.progress import Progress

__all__ = ["already_written", "progress", "result", "show"]

# Columns of a table that goes to a file or a pipe.
WIDTH = 80


@contextmanager
def progress(quiet: bool, verbose: bool = False) -> Iterator[Progress | None]:
    """Show on stderr how far the stages are.

    Lines with times if `verbose`; bars with the time left where somebody watches; else
    nothing.
    """
    if verbose and not quiet:
        yield _Lines()
    elif quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield None
    else:
        with _bars() as advance:
            yield advance


@contextmanager
def already_written(what: str) -> Iterator[None]:
    """Name what is there if somebody interrupts what follows."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; written before: {what}") from error


class _Lines:
    """A line for each stage that ends, with the time that it took."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        name = stage.partition(":")[0]
        started = self._started.setdefault(name, time.perf_counter())
        if done >= total:
            seconds = time.perf_counter() - started
            sys.stderr.write(f"{name}: {total} of {total}, {seconds:.1f} s\n")
            del self._started[name]
        elif stage != name:
            sys.stderr.write(f"{stage}, {done + 1} of {total}\n")


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            name = stage.partition(":")[0]
            if name not in tasks:
                tasks[name] = bars.add_task(stage, total=total)
            elif done == 0:
                # The stage of the next budget.
                bars.reset(tasks[name], total=total)
            running = done < total
            bars.update(
                tasks[name], description=stage, completed=done, total=total, visible=running
            )

        yield advance


class Result(Protocol):
    """What commands come to: rich renders it, and it can be written as JSON."""

    def to_json(self) -> str:
        """Return it as JSON."""

    def __rich__(self) -> RenderableType: ...


def result(found: Result, *, json: bool, quiet: bool, last: str = "") -> None:
    """Print what a command came to: JSON for scripts, a table for people, or nothing.

    Parameters
    ----------
    last : str
        A line for people, below the table.
    """
    if json:
        sys.stdout.write(found.to_json() + "\n")
    elif not quiet:
        show(found)
        if last:
            sys.stdout.write(last + "\n")


def show(renderable: Any) -> None:
    """Print something that rich can render, in 80 columns where there is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(renderable)
