"""Let one thread at a time into Python's parser, with which numpy reads the headers of arrays.

In Python 3.11 before 3.11.8, one that collects garbage there while another enters may fail with a
SystemError, "AST constructor recursion depth mismatch" (python/cpython#106905).
"""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

__all__ = ["PARSER"]

PARSER: AbstractContextManager[Any] = (
    threading.Lock() if (3, 11) <= sys.version_info < (3, 11, 8) else nullcontext()
)
"""To be held while numpy reads a header; of no effect where threads do not disturb each other."""
