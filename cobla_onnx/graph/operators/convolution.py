"""Extract the im2col patches that the weight of a convolution is multiplied with.

The order of a patch's entries is that of the weight's input side, (C / group, *kernel), so that
a weight of shape (N, C / group, *kernel) reshaped to rows times a patch gives an output position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ConvPatch", "cut"]

# Elements in a chunk of vectors, so that unfolding never multiplies the memory of a batch.
CHUNK = 1 << 22


@dataclass(frozen=True)
class ConvPatch:
    """How a convolution reads its data.

    Attributes
    ----------
    data : str
        Name of the tensor, of shape (batch, group * channels, *sizes).
    group, channels : int
        Groups, and channels in each.
    kernel, strides, dilations : tuple of int
    pads : tuple of int or str
        Begins then ends, or ``auto_pad``.
    """

    data: str
    group: int
    channels: int
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | str

    @property
    def groups(self) -> int:
        """Number of separate moments."""
        return self.group

    @property
    def size(self) -> int:
        """Entries of a vector."""
        return self.channels * math.prod(self.kernel)

    def positions(self, data: NDArray[Any]) -> int:
        """Vectors in a batch."""
        windows = self._windows(data)
        return math.prod(windows.shape[:1] + windows.shape[3 : 3 + len(self.kernel)])

    def vectors(
        self, data: NDArray[Any], chosen: NDArray[np.int64] | None = None, each: int = 1
    ) -> Iterator[NDArray[Any]]:
        """Yield chunks of patches, each of shape (groups, size, positions).

        Parameters
        ----------
        data : array
            A batch.
        chosen : int64 array, optional
            Indices of the patches to extract, by default all.
        each : int
            The size of chunks is a multiple of this.
        """
        windows = self._windows(data)
        spatial = len(self.kernel)
        places = (*windows.shape[:1], *windows.shape[3 : 3 + spatial])
        # (positions, group, channels, *kernel) to (group, channels, *kernel, positions)
        order = (*range(1, 3 + spatial), 0)
        if chosen is not None:
            for part in cut(len(chosen), self.group * self.size, each):
                sample, *where = np.unravel_index(chosen[part], places)
                wanted: tuple[Any, ...] = (sample, slice(None), slice(None), *where)
                picked = windows[wanted]
                yield picked.transpose(order).reshape(self.group, self.size, -1)
            return
        # (batch, group, channels, *positions, *kernel) to (group, channels, *kernel, batch, ...)
        order = (1, 2, *range(3 + spatial, 3 + 2 * spatial), 0, *range(3, 3 + spatial))
        per_sample = math.prod(places[1:])
        for part in cut(len(windows), self.group * self.size * per_sample, 1):
            yield windows[part].transpose(order).reshape(self.group, self.size, -1)

    def outputs(self, output: NDArray[Any]) -> NDArray[Any]:
        """Outputs at the positions of the patches, shape (groups, N / group, positions)."""
        grouped = output.reshape(len(output), self.group, -1, math.prod(output.shape[2:]))
        return grouped.transpose(1, 2, 0, 3).reshape(self.group, grouped.shape[2], -1)

    def _windows(self, data: NDArray[Any]) -> NDArray[Any]:
        padded = np.pad(data, [(0, 0), (0, 0), *self._padding(data.shape[2:])])
        axes = tuple(range(2, padded.ndim))
        span = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, span, axis=axes)
        steps = [slice(None, None, s) for s in self.strides]
        taps = [slice(None, None, d) for d in self.dilations]
        windows = windows[(slice(None), slice(None), *steps, *taps)]
        grouped: NDArray[Any] = windows.reshape(
            len(data), self.group, self.channels, *windows.shape[2:]
        )
        return grouped

    def _padding(self, sizes: tuple[int, ...]) -> list[tuple[int, int]]:
        if not isinstance(self.pads, str):
            half = len(self.kernel)
            return list(zip(self.pads[:half], self.pads[half:], strict=True))
        if self.pads == "VALID":
            return [(0, 0)] * len(sizes)
        result = []
        for size, k, s, d in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            result.append((small, large) if self.pads == "SAME_UPPER" else (large, small))
        return result


def cut(count: int, size: int, each: int) -> Iterator[slice]:
    """Split `count` vectors of some size into chunks of a multiple of `each` vectors."""
    step = max(1, CHUNK // max(size * each, 1)) * each
    for start in range(0, count, step):
        yield slice(start, start + step)
