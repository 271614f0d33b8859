"""Unnamed temporary files for what is too much for memory."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from typing import IO, Any

__all__ = ["scratch_file"]


def scratch_file(owner: object) -> tuple[IO[bytes], weakref.finalize[Any, Any]]:
    """Open a temporary file that goes when its owner does, or when the second value is called."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (closed with its owner)
    return file, weakref.finalize(owner, _close, file)


def _close(file: IO[bytes]) -> None:
    # On a full disk closing fails a second time, over what nobody wants any more.
    with contextlib.suppress(OSError):
        file.close()
