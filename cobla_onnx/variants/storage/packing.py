"""Pack codes of few bits into bytes.

Codes are split into planes of 4, 2 and 1 bits, since fields of these widths fill a byte. A byte of
the first plane holds the highest bits of a group of neighbours, the first of them lowest. What is
left of a group is one field of the second plane, which is cut into as many equal parts as fields
fit into a byte: field i of all bytes together holds part i. So a byte and a field give the index of
a group, and fields are concatenated and never interleaved when they are read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PLANES",
    "Count",
    "filling",
    "group_size",
    "pack",
    "pack_rows",
    "packed_bytes",
    "plane_names",
    "unpack",
]

Count = TypeVar("Count", int, NDArray[np.int64])

# Widths of the planes by the bits of a code, the one of the highest bits first.
PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def plane_names(bits: int) -> list[str]:
    """Names of what is stored for the planes."""
    return [f"plane_{number}" for number in range(len(PLANES[bits]))]


def group_size(bits: int) -> int:
    """Codes of a group: as many as a byte of the first plane holds."""
    return 8 // PLANES[bits][0]


def _unit(bits: int) -> int:
    """Fewest codes that fill bytes of all planes."""
    return 8 // PLANES[bits][-1]


def filling(count: Count, bits: int) -> Count:
    """Codes, fewer than 8, with which so many fill bytes of all planes; of an array, each."""
    return -count % _unit(bits)


def packed_bytes(count: Count, bits: int) -> Count:
    """Bytes that `count` codes take; of an array of counts, each."""
    return (count + filling(count, bits)) * bits // 8


def pack(codes: NDArray[np.uint8], bits: int) -> list[NDArray[np.uint8]]:
    """Pack codes below ``2 ** bits``; one array of bytes for each plane.

    Those of 4 bits are the bytes of a UINT4 tensor.

    Examples
    --------
    >>> [plane.tolist() for plane in pack(np.array([1, 2, 3, 12, 5], np.uint8), 4)]
    [[33, 195, 5]]
    >>> [plane.tolist() for plane in pack(np.array([1, 6, 63, 0], np.uint8), 6)]
    [[16, 15], [57]]
    """
    return [plane[0] for plane in pack_rows(codes.reshape(1, -1), bits)]


def pack_rows(codes: NDArray[np.uint8], bits: int) -> list[NDArray[np.uint8]]:
    """Pack the codes of each row for itself; one array of shape (rows, bytes) for each plane.

    Rows are filled up to whole bytes of all planes with zeros.
    """
    (rows, count), size = codes.shape, group_size(bits)
    padded = np.pad(codes, ((0, 0), (0, filling(count, bits))))
    groups = padded.reshape(rows, padded.shape[1] // size, size)
    first, rest = PLANES[bits][0], bits - PLANES[bits][0]
    planes = [_joined(groups >> np.uint8(rest), first)]
    if rest:
        fields = _joined(groups & np.uint8((1 << rest) - 1), rest)
        parts = fields.reshape(rows, 8 // (rest * size), -1).swapaxes(1, 2)
        planes.append(_joined(parts, rest * size))
    return planes


def unpack(planes: Sequence[NDArray[np.uint8]], bits: int, count: int) -> NDArray[np.uint8]:
    """Return the codes that `pack` packed.

    Examples
    --------
    >>> unpack([np.array([33, 195], np.uint8)], 4, 4).tolist()
    [1, 2, 3, 12]
    """
    size, rest = group_size(bits), bits - PLANES[bits][0]
    first, *below = planes
    codes = _split(first, PLANES[bits][0], size)
    for plane in below:
        fields = _split(plane, rest * size, 8 // (rest * size)).T.reshape(-1)
        codes = np.asarray(codes << rest | _split(fields, rest, size), np.uint8)
    return codes.reshape(-1)[:count]


def _joined(fields: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Join fields of a width along the last axis, the first one lowest."""
    result: NDArray[np.uint8] = fields[..., 0].copy()
    for number in range(1, fields.shape[-1]):
        result |= fields[..., number] << np.uint8(width * number)
    return result


def _split(joined: NDArray[np.uint8], width: int, count: int) -> NDArray[np.uint8]:
    """Undo `_joined`: return fields along a last axis of this length."""
    result = np.empty((*joined.shape, count), np.uint8)
    for number in range(count):
        result[..., number] = joined >> np.uint8(width * number) & np.uint8((1 << width) - 1)
    return result
