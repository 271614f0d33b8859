"""Which numbers of bits a weight may be stored in."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.errors import UsageError
from cobla_onnx.wording import option_name

__all__ = ["FORMATS", "HALF", "Precision", "in_half", "precision_bits"]

# Bits of half precision, which is a type of its own and not codes.
HALF = 16

FORMATS = (2, 3, 4, 5, 6, 8, HALF)
"""Numbers of bits."""

Precision: TypeAlias = Literal["keep", "auto"] | tuple[int, ...]


def precision_bits(precision: Precision) -> tuple[int, ...]:
    """Return the numbers of bits that an option asks for, ascending.

    Raises
    ------
    UsageError
        If it is not ``keep``, ``auto`` or a list of numbers in `FORMATS`.

    Examples
    --------
    >>> precision_bits("keep"), precision_bits((8, 4)), precision_bits("auto")
    ((), (4, 8), (2, 3, 4, 5, 6, 8, 16))
    """
    if precision == "keep":
        return ()
    if precision == "auto":
        return FORMATS
    if isinstance(precision, str) or not precision or not set(precision) <= set(FORMATS):
        allowed = ", ".join(map(str, FORMATS))
        raise UsageError(
            f"{option_name('precision', precision)}: give keep, auto, or some of {allowed}, "
            f"e.g. {option_name('precision', (8, 4))}"
        )
    return tuple(sorted(set(precision)))


def in_half(array: NDArray[Any]) -> NDArray[np.float16]:
    """Return an array in half precision.

    What overflows is infinite: its error says so, and it is refused where it would be stored.
    """
    with np.errstate(over="ignore"):
        return array.astype(np.float16)
