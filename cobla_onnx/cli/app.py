"""The application: its commands, which of them is the main one, and how errors end it."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from cobla_onnx import __version__
from cobla_onnx.cli import parameters
from cobla_onnx.cli.commands.advise import advise
from cobla_onnx.cli.commands.compare import compare
from cobla_onnx.cli.commands.compress import compress
from cobla_onnx.cli.commands.inspect import inspect
from cobla_onnx.cli.commands.sweep import sweep
from cobla_onnx.errors import CoblaError
from cobla_onnx.text import safe_text

__all__ = ["app", "main"]

MAIN_COMMAND = "compress"
# A pipe without a reader; the second one on Windows.
CLOSED = (errno.EPIPE, errno.EINVAL)


class MainCommandGroup(TyperGroup):
    """Commands of which one need not be named: ``cobla-onnx IN OUT`` is ``compress IN OUT``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the main command's name in front, where no command and no option of ours is."""
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0].partition("=")[0] not in own:
            args = [MAIN_COMMAND, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Say that there was an interrupt: typer leaves without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            _fail(str(error) or "interrupted; nothing was written", 130)


app = typer.Typer(
    cls=MainCommandGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(compress)
app.command()(advise)
app.command()(inspect)
app.command()(sweep)
app.command()(compare)


@app.callback()
def cobla_onnx(version: parameters.Version = False) -> None:
    """Make ONNX models smaller, by low rank and fewer bits, under hard budgets.

    The main job needs no command's name: cobla-onnx IN OUT --mem 0.3

    Its options: cobla-onnx compress --help
    """


def main() -> None:
    """Run the command line; turn errors into one line and an exit code."""
    _keep_stdout()
    try:
        app(standalone_mode=True)
    except CoblaError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        _fail(error.in_flags(), error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if _is_interrupt(error):
            _fail("interrupted; nothing was written", 130)
        _fail(
            f"a bug in cobla-onnx {__version__}: {type(error).__name__}: {error}; "
            "run again with --debug and report the traceback",
            1,
        )


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether an interrupt is behind an error: native modules make an `ImportError` of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class _Stdout(io.TextIOWrapper):
    """Stdout that goes on without a reader, ``head`` say: the work is in files."""

    def write(self, text: str) -> int:
        """Write, or drop what nobody reads."""
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Do as `write`."""
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in CLOSED:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _keep_stdout() -> None:
    """Keep native libraries off stdout, for the scripts that read it.

    HiGHS writes a line there now and then, whatever it is told.
    """
    if sys.stdout is None:
        return
    sys.stdout.flush()
    terminal = sys.stdout.isatty()
    sys.stdout = _Stdout(
        open(os.dup(1), "wb"),  # noqa: SIM115 - it stays open as long as the process
        encoding=sys.stdout.encoding,
        errors=sys.stdout.errors,
        line_buffering=terminal,
    )
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {safe_text(message, 2000)}\n")
    sys.exit(code)
