"""Which nodes stay in floating point beside 8 bits: cheap ones that take back much of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from cobla_onnx.allocation.paired import paired_gain
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.arithmetic.nodes import is_pooled, sole_readers

__all__ = ["cheap_nodes", "promising", "takes_back"]

# A node is left in floating point where that takes back this share of what 8 bits lose, and more
# than a standard error; it then runs two to three times longer, so that all of them together have
# at most this share of the MACs.
WORTH, MOST_MACS = 0.2, 0.05
# Losses below this are rounding.
LEAST = 1e-12


def cheap_nodes(
    model: onnx.ModelProto, macs: Mapping[int, int], weighted: Sequence[int], timed: bool
) -> tuple[list[int], int]:
    """Return the nodes that may be left in floating point, and the most MACs of all of them.

    One whose weight others read would take these with it, and one before a MaxPool takes long (see
    `is_pooled`). Whether the first one is faster in 8 bits is known where it was timed, and it is
    not left if so.

    Parameters
    ----------
    model : ModelProto
    macs : mapping of int to int
        By node, as far as they are known.
    weighted : sequence of int
        Nodes that compute in 8 bits, from the input on.
    timed : bool
        Whether it was measured how many of the first ones are faster in floating point.
    """
    most = int(MOST_MACS * sum(macs.values()))
    if len(weighted) <= 2:
        return [], most
    others = weighted[1:] if timed else weighted
    cheap = [place for place in others if macs.get(place, most + 1) <= most]
    alone = [place for place in cheap if sole_readers(model, [place])]
    return [place for place in alone if not is_pooled(model, place)], most


def promising(
    cheap: Sequence[int],
    without: Callable[[Sequence[int]], Float64 | None],
    before: Float64,
    lost: float,
) -> list[int]:
    """Return the nodes that may each take back much of the loss, those that gain most first.

    All of them are left in floating point at once, then either half, and so on as long as a group
    takes back what a single one should.

    Parameters
    ----------
    cheap : sequence of int
    without : callable
        Returns the losses with some nodes in floating point; None if none was in 8 bits then.
    before : float64 array, shape (samples,)
        Losses with all in 8 bits.
    lost : float
        What 8 bits lose on average.
    """
    gains, groups = dict[int, float](), [list(cheap)] if cheap and lost > 0 else []
    while groups:
        group = groups.pop()
        after = without(group)
        if after is not None and not takes_back(before, after, lost):
            continue
        half = len(group) // 2
        if half:
            groups += [group[half:], group[:half]]
        elif after is not None:
            gains[group[0]] = paired_gain(before, after).mean
    return sorted(gains, key=lambda place: -gains[place])


def takes_back(before: Float64, after: Float64, lost: float) -> bool:
    """Whether losses fall by much of what 8 bits lose, and by more than the noise.

    Where one sample makes nearly all of the loss, the standard error is as large as the mean: then
    the logarithms tell whether the others gain as well.
    """
    gain = paired_gain(before, after)
    if not (math.isfinite(lost) and lost > 0 and gain.mean > WORTH * lost):
        return False
    logarithms = (np.log(np.maximum(losses, LEAST)) for losses in (before, after))
    return gain.in_errors > 1 or paired_gain(*logarithms).in_errors > 1
