"""What reading a damaged array file raises, which is more than numpy and zipfile document."""

from __future__ import annotations

import contextlib
import struct
import tokenize
import zipfile
import zlib

__all__ = ["DAMAGED"]

DAMAGED: tuple[type[Exception], ...] = (
    # Of numpy's header, which is read as Python: tokens, literals, keys that do not sort, sizes.
    tokenize.TokenError,
    SyntaxError,
    ValueError,
    TypeError,
    OverflowError,
    MemoryError,
    # Of the archive: places before its start, unknown methods, encryption.
    OSError,
    EOFError,
    KeyError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
)
"""Errors of `numpy.load`, of the arrays that it gives and of `zipfile`, for a file of any bytes."""
with contextlib.suppress(ImportError):
    # Python may have been built without it; zipfile then has none either.
    import lzma

    DAMAGED += (lzma.LZMAError,)
