"""Which numbers of bits a weight may be stored in."""

from __future__ import annotations

from typing import Literal, TypeAlias

from cobla_onnx.errors import UsageError
from cobla_onnx.wording import option_name

__all__ = ["FORMATS", "HALF", "HALF_ERROR", "Precision", "precision_bits"]

# Bits of half precision, which is a type of its own and not codes.
HALF = 16
# Squared relative error of half precision, with numbers evenly between powers of 2: a twelfth of
# its squared unit there over a mean square of 7 / 3.
HALF_ERROR = 2.0**-20 / 28

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
