"""The levers that a model has, each with what its layers would lose: what `advise` compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cobla_onnx.allocation import (
    Constraint,
    LayerCurves,
    SeparableError,
    VariantCurve,
    WeightError,
)
from cobla_onnx.allocation.bound import Front, least_losses
from cobla_onnx.allocation.objective import loss_curves
from cobla_onnx.allocation.subproblem import Subproblem
from cobla_onnx.pipeline.session import Session
from cobla_onnx.variants.registry import level_of, require_family

__all__ = ["Lever", "levers_of", "losses_of"]


@dataclass(frozen=True)
class Lever:
    """Some families of variants, with the loss of each of their curves.

    Attributes
    ----------
    layers : sequence of LayerCurves
        Only those for which one of the families has a curve.
    losses : SeparableError
    """

    layers: Sequence[LayerCurves]
    losses: SeparableError

    def front(self, constraint: Constraint) -> Front:
        """Return the least loss at every fraction of a resource, limited for these layers."""
        losses = loss_curves(self.losses, self.layers)
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
    whole = session.analysis.curves

    def lever(wanted: Callable[[VariantCurve], bool]) -> Lever:
        part = Subproblem.keeping(whole, wanted)
        return Lever(part.layers, part.losses(losses))

    return {
        "ranks": lever(lambda curve: not require_family(curve.scheme).needs_bits),
        "bits": lever(lambda curve: level_of(curve.scheme) == "bits"),
        "both": lever(lambda _: True),
    }
