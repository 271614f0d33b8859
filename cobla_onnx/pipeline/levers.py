"""The levers that a model has, each with what its layers would lose: what `advise` compares."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cobla_onnx.allocation import (
    Constraint,
    LayerCurves,
    OutputError,
    SeparableError,
    WeightError,
)
from cobla_onnx.allocation.bound import Front, least_losses
from cobla_onnx.pipeline.session import Session
from cobla_onnx.variants.registry import FAMILIES

__all__ = ["Lever", "levers_of", "losses_of"]


@dataclass(frozen=True)
class Lever:
    """Some families of variants, with the loss of each of their curves.

    Attributes
    ----------
    layers : list of LayerCurves
        Only those for which one of the families has a curve.
    losses : SeparableError
    """

    layers: list[LayerCurves]
    losses: SeparableError

    def front(self, constraint: Constraint) -> Front:
        """Return the least loss at every fraction of a resource."""
        losses = [
            [self.losses.curve(index, number) for number in range(len(layer.curves))]
            for index, layer in enumerate(self.layers)
        ]
        return least_losses(self.layers, losses, constraint, points=1000)


def losses_of(session: Session, constraints: Sequence[Constraint]) -> tuple[SeparableError, int]:
    """Return the predicted loss of each point of each curve, and on how many samples.

    Without data these are squared relative errors of the weights, and the samples are 0.
    """
    analysis, evidence = session.analysis, session.evidence
    if evidence is None or not analysis.layers:
        return WeightError(analysis.curves), 0
    measured = evidence.sensitivity(constraints[:1], final=True)
    return measured.objective(), measured.samples


def levers_of(session: Session, losses: SeparableError) -> dict[str, Lever]:
    """Return the levers ``ranks``, ``bits`` and ``both``.

    The session must compare families, with ``precision="auto"``: else there are no bits.
    """
    bits = {name for name, family in FAMILIES.items() if family.level == "bits"}
    unrounded = {name for name, family in FAMILIES.items() if not family.needs_bits}
    return {
        "ranks": _lever(session, losses, unrounded),
        "bits": _lever(session, losses, bits),
        "both": _lever(session, losses, set(FAMILIES)),
    }


def _lever(session: Session, losses: SeparableError, families: Collection[str]) -> Lever:
    layers, kept = [], []
    for index, layer in enumerate(session.analysis.curves):
        numbers = [k for k, curve in enumerate(layer.curves) if curve.family in families]
        if numbers:
            layers.append(replace(layer, curves=tuple(layer.curves[k] for k in numbers)))
            kept.append([losses.curve(index, k) for k in numbers])
    return Lever(layers, OutputError(kept))
