"""Sample positions of large inputs, where fewer than all are enough.

Neighbouring positions of a large image or a long sequence tell nearly the same. Of each
sample so many are taken that their vectors come to `NUMBERS` numbers, and `LEAST` at least:
one from each of as many equal stretches, at random within it. The seed is the content of the
sample, so that the choice is the same in whatever batch, thread or order it comes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.patches import Patch

__all__ = ["LEAST", "NUMBERS", "Chosen", "choose_positions", "sample_seeds"]

# Numbers in the vectors of a sample, over all groups, and its vectors at least.
NUMBERS, LEAST = 1 << 21, 1024


@dataclass(frozen=True)
class Chosen:
    """Vectors of a batch that count.

    Attributes
    ----------
    index : int64 array, shape (samples * each,), or None
        Their numbers, ascending; None stands for all.
    each : int
        How many of each sample.
    share : float
        Of the vectors that the batch has.
    """

    index: NDArray[np.int64] | None
    each: int
    share: float


def sample_seeds(feeds: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
    """Return a seed for each sample of a batch, from its content.

    Samples lie along the first axis where all inputs agree about it; otherwise the whole batch
    is one.
    """
    arrays = [np.asarray(array) for _, array in sorted(feeds.items())]
    firsts = {array.shape[0] if array.ndim else 0 for array in arrays}
    count = firsts.pop() if len(firsts) == 1 else 0
    parts = [[array[i] for array in arrays] for i in range(count)] or [arrays]
    return tuple(_content(part) for part in parts)


def _content(arrays: Sequence[NDArray[Any]]) -> int:
    seed = 0
    for array in arrays:
        if array.dtype.kind in "OSU":
            seed = zlib.crc32(repr(array.tolist()).encode(), seed)
        else:
            seed = zlib.crc32(np.ascontiguousarray(array).data, seed)
    return seed


def choose_positions(patch: Patch, data: NDArray[Any], seeds: Sequence[int]) -> Chosen:
    """Choose vectors of a batch; all of them where they are few.

    Parameters
    ----------
    patch : Patch
    data : array
        Of which it reads vectors.
    seeds : sequence of int
        One for each sample.
    """
    total = patch.positions(data)
    if total % len(seeds):
        # The tensor mixes samples up.
        seeds = seeds[:1]
    whole = total // len(seeds)
    each = max(LEAST, NUMBERS // (patch.groups * patch.size))
    if whole <= each:
        return Chosen(None, max(whole, 1), 1.0)
    # Ends of the stretches; a number below each length is drawn.
    ends = np.arange(each + 1) * whole // each
    lengths = np.diff(ends)
    parts = []
    for number, seed in enumerate(seeds):
        draws = np.random.default_rng([seed, whole]).random(each)
        parts.append(number * whole + ends[:-1] + (draws * lengths).astype(np.int64))
    return Chosen(np.concatenate(parts), each, each / whole)
