"""Values of options that are words or numbers, and how they are checked and read."""

from __future__ import annotations

import math
import re
from typing import Literal, TypeAlias

from cobla_onnx.errors import UsageError
from cobla_onnx.wording import option_name

__all__ = ["BatchSize", "check_augment", "memory_bytes"]

BatchSize: TypeAlias = Literal["auto"] | int

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def check_augment(augment: str | None, distil: object, labels: object) -> None:
    """Check how images may vary, None for not at all.

    Raises
    ------
    UsageError
        If it is not known, nothing learns, or there are labels.
    """
    if augment is None:
        return
    # Importing it takes a second, which the help has not.
    from cobla_onnx.distillation.augmentation import Augmentation

    Augmentation.of(augment)
    what = option_name("augment", augment)
    if distil is None:
        raise UsageError(f"{what}: is for what learns; give {option_name('distil', 'auto')} too")
    if labels is not None:
        raise UsageError(
            f"{what}: labels would not follow the images; leave it out, or {option_name('labels')}"
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
    size = float(found[1]) * UNITS.get(found[2], 0) if found else 0.0
    if not 1 <= size < math.inf:
        raise UsageError(
            f"{option_name('memory_limit', limit)}: is not a number of bytes; write e.g. 2GB, "
            "1500MB or 2000000000"
        )
    return int(size)
