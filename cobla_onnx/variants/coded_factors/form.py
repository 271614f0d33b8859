"""Forms of coded factors: a matricisation, and the bits in which both factors are stored."""

from __future__ import annotations

from dataclasses import dataclass

from cobla_onnx.variants.low_rank.matricisation import Scheme

__all__ = ["CodedScheme", "coded_name", "split_name"]


def coded_name(scheme: str, bits: int) -> str:
    """Name of a form.

    Examples
    --------
    >>> coded_name("channel", 4)
    'channel@4'
    """
    return f"{scheme}@{bits}"


def split_name(name: str) -> tuple[str, int | None]:
    """Return the scheme in the name of a form of any family, and its bits if it has some.

    Examples
    --------
    >>> split_name("channel@4"), split_name("channel")
    (('channel', 4), ('channel', None))
    """
    scheme, _, bits = name.partition("@")
    return (scheme, int(bits)) if bits.isdecimal() else (name, None)


@dataclass(frozen=True)
class CodedScheme:
    """A matricisation whose factors are stored in fewer bits.

    Attributes
    ----------
    scheme : Scheme
    bits : int
        One of those in `precision.FORMATS`.
    """

    scheme: Scheme
    bits: int

    @property
    def name(self) -> str:
        """Name in plans and reports, such as ``channel@4``."""
        return coded_name(self.scheme.name, self.bits)
