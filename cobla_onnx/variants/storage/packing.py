"""Pack codes of few bits into bytes.

Codes are split into planes of 4, 2 and 1 bits, since fields of these widths fill a byte. A plane
is cut into as many equal parts as fields fit into a byte, and field i of all bytes together holds
part i. So parts are concatenated, and never interleaved, when they are read back.

Rows that are decoded whenever they are read have their codes in groups of neighbours, which are
looked up together (`pack_rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PLANES",
    "Count",
    "group_size",
    "pack",
    "pack_rows",
    "packed_bytes",
    "paired",
    "row_bytes",
    "row_unit",
    "unpack",
]

Count = TypeVar("Count", int, NDArray[np.int64])

# Widths of the planes by the bits of a code, the one of the highest bits first.
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def packed_bytes(count: Count, bits: int) -> Count:
    """Bytes that `count` codes take; of an array of counts, each."""
    total = 0 * count
    for width in PLANES[bits]:
        total = total - (-count * width // 8)
    return total


def pack(codes: NDArray[np.uint8], bits: int) -> list[NDArray[np.uint8]]:
    """Pack codes below ``2 ** bits``; one array of bytes for each plane.

    Examples
    --------
    >>> [plane.tolist() for plane in pack(np.array([1, 2, 3, 12], np.uint8), 4)]
    [[49, 194]]
    """
    flat, above, planes = codes.reshape(1, -1), bits, []
    for width in PLANES[bits]:
        above -= width
        fields = np.asarray((flat >> above) & ((1 << width) - 1), np.uint8)
        planes.append(_in_parts(fields, width)[0])
    return planes


def unpack(planes: Sequence[NDArray[np.uint8]], bits: int, count: int) -> NDArray[np.uint8]:
    """Return the codes that `pack` packed.

    Examples
    --------
    >>> unpack([np.array([49, 194], np.uint8)], 4, 4).tolist()
    [1, 2, 3, 12]
    """
    codes: NDArray[np.uint8] = np.zeros(count, np.uint8)
    for plane, width in zip(planes, PLANES[bits], strict=True):
        shifts = (width * np.arange(8 // width, dtype=np.uint8))[:, None]
        fields = (plane >> shifts) & ((1 << width) - 1)
        codes = np.asarray((codes << width) | fields.reshape(-1)[:count], np.uint8)
    return codes


def _in_parts(fields: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Put fields of a width into bytes: of each row, part i into field i of all bytes."""
    rows, count = fields.shape
    parts = 8 // width
    length = -(-count // parts)
    padded = np.zeros((rows, parts * length), np.uint8)
    padded[:, :count] = fields
    shifts = (width * np.arange(parts, dtype=np.uint8))[:, None]
    return np.asarray(np.bitwise_or.reduce(padded.reshape(rows, parts, length) << shifts, axis=1))


def group_size(bits: int) -> int:
    """Codes of a group: as many as a byte of the first plane holds."""
    return 8 // PLANES[bits][0]


def row_unit(bits: int) -> int:
    """Codes of a row that fill bytes of all planes."""
    return 8 // PLANES[bits][-1]


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row of so many codes."""
    units = -(-width // row_unit(bits))
    return units * row_unit(bits) * bits // 8


def pack_rows(codes: NDArray[np.uint8], bits: int) -> list[NDArray[np.uint8]]:
    """Pack the codes of each row for itself; one array of shape (rows, bytes) for each plane.

    A byte of the first plane holds the highest bits of a group of neighbours, those of the first
    one lowest. What is left of a group is one field of the second plane, if there is one, and
    fields are put into bytes as those of `pack`. Rows are filled up to whole bytes with zeros.

    Examples
    --------
    >>> [plane.tolist() for plane in pack_rows(np.array([[1, 2, 3, 12]], np.uint8), 4)]
    [[[33, 195]]]
    >>> [plane.tolist() for plane in pack_rows(np.array([[1, 6, 63, 0]], np.uint8), 6)]
    [[[16, 15], [57]]]
    """
    (rows, count), size, unit = codes.shape, group_size(bits), row_unit(bits)
    padded = np.zeros((rows, -(-count // unit) * unit), np.uint8)
    padded[:, :count] = codes
    groups = padded.reshape(rows, -1, size)
    first, rest = PLANES[bits][0], bits - PLANES[bits][0]
    place = np.arange(size, dtype=np.uint8)
    planes = [np.bitwise_or.reduce(groups >> rest << first * place, axis=2)]
    if rest:
        below = groups & ((1 << rest) - 1)
        planes.append(_in_parts(np.bitwise_or.reduce(below << rest * place, axis=2), rest * size))
    return planes


def paired(plane: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    """Turn the plane of codes of 4 bits into the bytes of a UINT4 tensor: neighbours share one.

    Examples
    --------
    >>> paired(pack(np.array([1, 2, 3, 12, 5], np.uint8), 4)[0], 5).tolist()
    [33, 195, 5]
    """
    fields = np.concatenate([plane & 15, plane >> 4])[:count]
    if count % 2:
        fields = np.append(fields, np.uint8(0))
    return np.asarray(fields[0::2] | fields[1::2] << 4)
