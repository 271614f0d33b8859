"""The model in 8 bits with all its ranks, where many budgets of a session end: it is made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import onnx

from cobla_onnx.pipeline.search.eight_bit_search import EightBits

__all__ = ["EightBitsAlone"]

IsFast: TypeAlias = Callable[[onnx.ModelProto], bool]
"""Whether a model is fast enough."""
_Asked: TypeAlias = tuple[int | None, int | None]


@dataclass(frozen=True)
class _Made:
    """A model in 8 bits, and how long those took that were timed for it.

    Attributes
    ----------
    eight_bits : EightBits
    latency : float or None
        The budget's.
    ratios : tuple of float
        Of those with one node more in floating point, as fractions of the original's time.
    """

    eight_bits: EightBits
    latency: float | None
    ratios: tuple[float, ...]

    def stands(self, latency: float | None) -> bool:
        """Whether it is also the one for another budget: no time lies between the two limits."""
        if self.latency is None or latency is None:
            return self.latency is latency
        limits = (self.latency, latency)
        return all(len({ratio <= limit for limit in limits}) == 1 for ratio in self.ratios)


class EightBitsAlone:
    """Keeps the model in 8 bits that was made last, and what it was made for."""

    def __init__(self) -> None:
        self._last: tuple[_Asked, _Made] | None = None

    def once(
        self,
        asked: _Asked,
        latency: float | None,
        ratio: Callable[[onnx.ModelProto], float],
        make: Callable[[IsFast], EightBits],
    ) -> EightBits:
        """Return the model for a budget; make it if the last one did not end at the same.

        Parameters
        ----------
        asked : (int or None, int or None)
            `most` and `head`, which the model depends on; see `in_eight_bits`.
        latency : float or None
            Fraction of the original's time that it may take.
        ratio : callable
            Times a model, as such a fraction.
        make : callable
            Takes what tells whether a model is fast enough.
        """
        if self._last is not None:
            before, known = self._last
            if before == asked and known.stands(latency):
                return _copied(known.eight_bits)
        ratios = list[float]()

        def is_fast(model: onnx.ModelProto) -> bool:
            if latency is None:
                return True
            ratios.append(ratio(model))
            return ratios[-1] <= latency

        made = make(is_fast)
        self._last = asked, _Made(_copied(made), latency, tuple(ratios))
        return made


def _copied(made: EightBits) -> EightBits:
    """Copy what is written: its nodes are put back in the order of the file."""
    model = onnx.ModelProto()
    model.CopyFrom(made.model)
    return replace(made, model=model)
