"""Pack codes of few bits into bytes.

Codes are split into planes of 4, 2 and 1 bits, since fields of these widths fill a byte. A plane
is cut into as many equal parts as fields fit into a byte, and field i of all bytes together holds
part i. So parts are concatenated, and never interleaved, when they are read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["PLANES", "Count", "pack", "pack_rows", "packed_bytes", "paired", "unpack"]

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
    return [plane[0] for plane in pack_rows(codes.reshape(1, -1), bits)]


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


def pack_rows(codes: NDArray[np.uint8], bits: int) -> list[NDArray[np.uint8]]:
    """Pack the codes of each row for itself; one array of shape (rows, bytes) for each plane."""
    (rows, count), above = codes.shape, bits
    planes = []
    for width in PLANES[bits]:
        above -= width
        fields = (codes >> above) & ((1 << width) - 1)
        parts = 8 // width
        length = -(-count // parts)
        padded = np.zeros((rows, parts * length), np.uint8)
        padded[:, :count] = fields
        shifts = (width * np.arange(parts, dtype=np.uint8))[:, None]
        split = padded.reshape(rows, parts, length) << shifts
        planes.append(np.bitwise_or.reduce(split, axis=1))
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
