"""Which numbers of bits a weight may be stored in."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.errors import UsageError
from cobla_onnx.wording import option_name

__all__ = [
    "FORMATS",
    "HALF",
    "Precision",
    "decoded",
    "in_half",
    "precision_bits",
    "require_decoded",
]

# Bits of half precision, which is a type of its own and not codes.
HALF = 16

FORMATS = (2, 3, 4, 5, 6, 8, HALF)
"""Numbers of bits."""

# The opsets from which a Cast names a type by its number, which is all that half precision needs,
# and from which operators broadcast as decoding needs it.
CAST_FROM, DECODED_FROM = 6, 7

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
    if isinstance(precision, str) and precision == "keep":
        return ()
    if isinstance(precision, str) and precision == "auto":
        return decoded(opset)
    if not isinstance(precision, tuple | list) or not precision or not all(map(_known, precision)):
        allowed = ", ".join(map(str, FORMATS))
        raise UsageError(
            f"{option_name('precision', precision)}: give keep, auto, or some of {allowed}, "
            f"e.g. {option_name('precision', (8, 4))}"
        )
    found = tuple(sorted(set(precision)))
    require_decoded(found, opset, option_name("precision", precision))
    return found


def decoded(opset: int) -> tuple[int, ...]:
    """Return the numbers of bits that a model of an opset can decode."""
    return tuple(bits for bits in FORMATS if opset >= _least(bits))


def require_decoded(bits: Collection[int], opset: int, asked: str) -> None:
    """Refuse numbers of bits that the opset of a model cannot decode.

    Parameters
    ----------
    bits : collection of int
    opset : int
    asked : str
        Where they come from, for the message.

    Raises
    ------
    UsageError
    """
    least = max(map(_least, bits), default=opset)
    if opset < least:
        half = opset >= CAST_FROM
        kind = (
            f"fewer than {HALF} bits are decoded"
            if least == DECODED_FROM
            else "half precision are cast"
        )
        instead = f", or give {option_name('precision', (HALF,))}" if half else ""
        raise UsageError(
            f"{asked}: weights in {kind} by operators of opset {least}, and the model has {opset}; "
            f"export it with a newer one{instead}"
        )


def _least(bits: int) -> int:
    return CAST_FROM if bits == HALF else DECODED_FROM


def _known(bits: object) -> bool:
    return isinstance(bits, Integral) and bits in FORMATS


def in_half(array: NDArray[Any]) -> NDArray[np.float16]:
    """Return an array in half precision.

    What overflows is infinite: its error says so, and it is refused where it would be stored.
    """
    with np.errstate(over="ignore"):
        return array.astype(np.float16)
