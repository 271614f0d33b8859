"""Sample positions of large inputs, where fewer than all are enough.

Neighbouring positions of a large image or a long sequence are nearly the same. Of each sample as
many positions are used as make `NUMBERS` numbers, but at least `LEAST`: one at random from each
of as many equal stretches. The seed is the content of the sample, so that the choice does not
depend on batch, thread or order. Of many samples, fewer of each are enough.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.graph.operators.patches import Patch

__all__ = ["LEAST", "NUMBERS", "Chosen", "choose_positions", "enough_positions", "sample_seeds"]

# Numbers in the vectors of a sample, over all groups, and the least number of its vectors.
NUMBERS, LEAST = 1 << 21, 1024
# Least number of a sample's vectors where there are many samples.
LEAST_OF_MANY = 64


@dataclass(frozen=True)
class Chosen:
    """The chosen vectors of a batch.

    Attributes
    ----------
    index : int64 array, shape (samples * each,), or None
        Their indices, ascending; None for all.
    each : int
        Number chosen from each sample.
    share : float
        Chosen fraction of the vectors in the batch.
    """

    index: NDArray[np.int64] | None
    each: int
    share: float


def sample_seeds(feeds: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
    """Return a seed for each sample of a batch, from its content.

    Samples are along the first axis if all inputs have the same number of rows; otherwise the
    whole batch is one sample.
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


def enough_positions(patch: Patch, samples: int, vectors: int) -> int:
    """Return how many of a sample's vectors give `vectors` for each entry of one, over all."""
    return max(LEAST_OF_MANY, math.ceil(vectors * patch.size / samples))


def choose_positions(
    patch: Patch, data: NDArray[Any], seeds: Sequence[int], most: int | None = None
) -> Chosen:
    """Choose vectors of a batch; all of them if there are few.

    Parameters
    ----------
    patch : Patch
    data : array
        The tensor from which the patch takes vectors.
    seeds : sequence of int
        One for each sample.
    most : int, optional
        Most vectors of a sample, where still fewer are enough.
    """
    total = patch.positions(data)
    if total % len(seeds):
        # The tensor does not keep samples apart.
        seeds = seeds[:1]
    whole = total // len(seeds)
    each = max(LEAST, NUMBERS // (patch.groups * patch.size))
    each = each if most is None else min(each, most)
    if whole <= each:
        return Chosen(None, max(whole, 1), 1.0)
    return Chosen(_drawn(tuple(seeds), whole, each), each, each / whole)


# Layers that follow each other often read as many positions of the same samples.
@lru_cache(maxsize=8)
def _drawn(seeds: tuple[int, ...], whole: int, each: int) -> NDArray[np.int64]:
    """Draw `each` of the `whole` positions of every sample; the array must not be changed."""
    # Ends of the stretches; an offset below each length is drawn.
    ends = np.arange(each + 1) * whole // each
    lengths = np.diff(ends)
    parts = []
    for number, seed in enumerate(seeds):
        draws = np.random.default_rng([seed, whole]).random(each)
        parts.append(number * whole + ends[:-1] + (draws * lengths).astype(np.int64))
    return np.concatenate(parts)
