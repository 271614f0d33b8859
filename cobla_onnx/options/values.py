"""Values of options that are words or numbers, and how they are checked and read."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from cobla_onnx.errors import UsageError
from cobla_onnx.wording import option_name

__all__ = ["BatchSize", "check_batch", "memory_bytes"]

BatchSize: TypeAlias = Literal["auto"] | int

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def check_batch(batch: object) -> None:
    """Check a number of samples that run at a time.

    Raises
    ------
    UsageError
        If it is neither ``auto`` nor a whole number of at least 1.
    """
    if batch != "auto" and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise UsageError(
            f"{option_name('batch', batch)}: give auto, or a whole number of at least 1"
        )


def memory_bytes(limit: int | str | None) -> int | None:
    """Bytes of a limit such as ``2GB``, ``1500MB`` or ``2000000000``.

    Raises
    ------
    UsageError
        If it is not one.

    Examples
    --------
    >>> memory_bytes("1.5GB"), memory_bytes("2 GiB"), memory_bytes(100)
    (1500000000, 2147483648, 100)
    """
    if limit is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(limit).strip().lower(), re.ASCII)
    size = int(float(found[1]) * UNITS.get(found[2], 0)) if found else 0
    if not size:
        raise UsageError(
            f"{option_name('memory_limit', limit)}: is not a number of bytes; write e.g. 2GB, "
            "1500MB or 2000000000"
        )
    return size
