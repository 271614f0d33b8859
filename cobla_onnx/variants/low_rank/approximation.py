"""A layer's weight as the product of two factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from cobla_onnx.runtime.pool import one_thread
from cobla_onnx.variants.low_rank.matricisation import Scheme
from cobla_onnx.variants.low_rank.svd import Factorization, Float64

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LowRankWeight"]


@dataclass(frozen=True)
class LowRankWeight:
    """A layer's approximated weight at some rank.

    Attributes
    ----------
    scheme : Scheme
    factors : Factorization
    bias : float64 array or None
        Corrected to keep the mean of the output; None if the layer has no bias of its own.
    """

    scheme: Scheme
    factors: Factorization
    bias: Float64 | None

    @cached_property
    def weight(self) -> Float64:
        """The factors multiplied out, shape ``layer.shape``."""
        with one_thread:
            return self.scheme.weight(self.factors.left @ self.factors.right)

    def with_bias(self, bias: Float64) -> Self:
        """Return the same weight with another bias; it is not multiplied out again."""
        result = replace(self, bias=bias)
        if "weight" in vars(self):
            vars(result)["weight"] = self.weight
        return result
