"""What families share whose levels are numbers of bits: costs, proposals, errors of all levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation import VariantCurve
from cobla_onnx.allocation.resources import known_costs
from cobla_onnx.errors import UsageError
from cobla_onnx.graph.inventory import Reason, Refusal
from cobla_onnx.graph.layers import Layer
from cobla_onnx.text import quoted
from cobla_onnx.variants.base import Asked, LayerCosts, Proposal, VariantFamily
from cobla_onnx.variants.low_rank.svd import Float64
from cobla_onnx.variants.storage.precision import FORMATS

__all__ = ["MOST", "BitsFamily", "between"]

# The level of a weight as it is stored today: bits of single precision.
MOST = 32


class BitsFamily(VariantFamily, Protocol):
    """All numbers of a weight in fewer bits: as many of them, and as many MACs.

    A family of this kind has one form, and says which layers it takes (`forms`, `refusal`) and what
    they take in so many bits (`stored_bytes`).
    """

    level: str = "bits"
    needs_bits: bool = True
    outcome: str = "stored in fewer bits"

    def stored_bytes(self, layer: Layer, bits: int) -> int:
        """Bytes of a weight in so many bits, with all that decodes it; never too few."""
        ...

    def refusal(self, layer: Layer) -> Refusal:
        """Say why a layer has no form."""
        ...

    def most(self, layer: Layer, form: Any) -> int:
        """Return the bits of single precision."""
        return MOST

    def check_level(self, layer: Layer, form: Any, level: int | None) -> int:
        """Return the bits that a plan gives, if there is such a format.

        Raises
        ------
        UsageError
            If there is not.
        """
        if level not in FORMATS:
            raise UsageError(
                f"plan: layer {quoted(layer.name)} cannot be stored in {level} bits; there are "
                f"{', '.join(map(str, FORMATS))}"
            )
        return level

    def propose(
        self, layer: Layer, costs: LayerCosts, asked: Asked
    ) -> Sequence[Proposal] | Refusal:
        """Propose the numbers of bits that were asked for and take fewer bytes."""
        forms = self.forms(layer)
        if not forms:
            return self.refusal(layer)
        if not asked.bits:
            return Refusal(Reason.UNASKED)
        smaller = [
            b for b in sorted(asked.bits) if self.stored_bytes(layer, b) < layer.stored_bytes
        ]
        if not smaller:
            return Refusal(Reason.NO_GAIN)
        return [Proposal(form, np.array(smaller, np.int64), MOST) for form in forms]

    def curve(
        self,
        layer: Layer,
        costs: LayerCosts,
        proposal: Proposal,
        errors: Float64,
        spectrum: Float64 | None,
    ) -> VariantCurve:
        """Put bytes and errors together; MACs stay as they are."""
        levels = proposal.levels
        found: dict[str, NDArray[Any]] = {
            "mem": np.array([self.stored_bytes(layer, int(bits)) for bits in levels])
        }
        for name, cost in known_costs(mac=costs.macs).items():
            found[name] = np.full(len(levels), cost)
        return VariantCurve(self.name, proposal.form.name, levels, found, errors, nested=False)

    def params(self, layer: Layer, form: Any, level: int) -> int:
        """Count the weights, which stay as many."""
        return layer.params

    def macs(self, layer: Layer, form: Any, level: int, costs: LayerCosts) -> int | None:
        """Return the MACs of the layer, which stay as they are."""
        return costs.macs


def between(known: Mapping[int, float]) -> Float64:
    """Errors at all numbers of bits from 0 to `MOST`, descending from 1 to 0.

    Parameters
    ----------
    known : mapping of int to float
        Squared relative errors by bits; in between they are interpolated in logarithms. Those that
        are not finite, of numbers that overflow their type, are infinite there.

    Returns
    -------
    float64 array, shape (MOST + 1,)
    """
    beyond = [bits for bits, error in known.items() if not np.isfinite(error)]
    known = {0: 1.0, MOST: 0.0, **{b: e for b, e in known.items() if b not in beyond}}
    places = sorted(known)
    values = np.array([max(known[place], 1e-12) for place in places])
    errors = np.exp(np.interp(np.arange(MOST + 1), places, np.log(values)))
    errors[MOST] = 0.0
    errors = np.minimum.accumulate(np.minimum(errors, 1.0))
    errors[beyond] = np.inf
    return np.asarray(errors)
