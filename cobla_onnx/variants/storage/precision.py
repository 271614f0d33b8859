"""Which numbers of bits a weight may be stored in."""

from __future__ import annotations

from numbers import Integral
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

DECODED_FROM = 7
"""The opset from which operators broadcast as decoding needs it; half precision needs none."""

Precision: TypeAlias = Literal["keep", "auto"] | tuple[int, ...]


def precision_bits(precision: Precision, opset: int = DECODED_FROM) -> tuple[int, ...]:
    """Return the numbers of bits that an option asks for, ascending.

    Parameters
    ----------
    precision : 'keep', 'auto' or tuple of int
    opset : int
        Of the model; ``auto`` are all that it can decode.

    Raises
    ------
    UsageError
        If it is not ``keep``, ``auto`` or a list of numbers in `FORMATS`, or the opset cannot
        decode them.

    Examples
    --------
    >>> precision_bits("keep"), precision_bits((8, 4)), precision_bits("auto")
    ((), (4, 8), (2, 3, 4, 5, 6, 8, 16))
    """
    if isinstance(precision, str) and precision in ("keep", "auto"):
        known = FORMATS if opset >= DECODED_FROM else (HALF,)
        return known if precision == "auto" else ()
    if not isinstance(precision, tuple | list) or not precision or not all(map(_known, precision)):
        allowed = ", ".join(map(str, FORMATS))
        raise UsageError(
            f"{option_name('precision', precision)}: give keep, auto, or some of {allowed}, "
            f"e.g. {option_name('precision', (8, 4))}"
        )
    found = tuple(sorted(set(precision)))
    if opset < DECODED_FROM and found != (HALF,):
        raise UsageError(
            f"{option_name('precision', precision)}: weights in fewer than {HALF} bits are decoded "
            f"by operators of opset {DECODED_FROM}, and the model has {opset}; export it with a "
            f"newer one, or give {option_name('precision', (HALF,))}"
        )
    return found


def _known(bits: object) -> bool:
    return isinstance(bits, Integral) and bits in FORMATS


def in_half(array: NDArray[Any]) -> NDArray[np.float16]:
    """Return an array in half precision.

    What overflows is infinite: its error says so, and it is refused where it would be stored.
    """
    with np.errstate(over="ignore"):
        return array.astype(np.float16)
