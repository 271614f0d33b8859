"""What a memory budget would predict if weights might also be stored in fewer bits.

The separable programme is solved a second time, with the curves of storage beside those of ranks.
Their errors follow from the moments that are there and go through each layer's response, which was
measured for the ranks, so that no sample is run again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cobla_onnx.allocation import OutputError, VariantCurve, allocate
from cobla_onnx.graph.inventory import Refusal
from cobla_onnx.graph.protos import opset_of
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.report.model import Forecast
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.progress import silent
from cobla_onnx.variants.base import Asked, Candidate, LayerCosts, LayerVariants
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK
from cobla_onnx.variants.storage.family import StorageFamily
from cobla_onnx.variants.storage.precision import decoded
from cobla_onnx.variants.work import measured_curves

if TYPE_CHECKING:
    import onnx

    from cobla_onnx.pipeline.session import Session, Solution

__all__ = ["VISIBLE", "bit_curves", "forecast", "forecast_note"]

VISIBLE = {"accuracy": 0.01, "agreement": 0.01, "relative error": 0.05}
"""Measured losses of quality above which a person is told."""
# A forecast above this share of what ranks alone predict, or were measured to lose after refit, is
# not told: the two are known to no more than that.
WORTH = 0.5


def bit_curves(
    model: onnx.ModelProto, analysis: Analysis, context: RunContext
) -> tuple[VariantCurve | None, ...]:
    """Return the curve of each layer stored in fewer bits as a whole; None where there is none."""
    bits = decoded(opset_of(model))
    candidates = [_candidate(each, analysis, bits) for each in analysis.variants]
    quiet = replace(context, progress=silent)
    found = measured_curves(model, candidates, analysis.from_data, quiet)
    pairs = [found.get(layer.name) for layer in analysis.layers]
    return tuple(None if not pair else pair[0][1] for pair in pairs)


def _candidate(each: LayerVariants, analysis: Analysis, bits: tuple[int, ...]) -> Candidate:
    costs = LayerCosts(each.macs, analysis.shapes)
    asked = Asked("auto", EVERY_RANK, bits)
    proposed = StorageFamily().propose(each.layer, costs, asked)
    return Candidate(each.layer, costs, () if isinstance(proposed, Refusal) else tuple(proposed))


def forecast(session: Session, solution: Solution) -> Forecast | None:
    """Return the forecast for the budget of a solution, where it is worth telling.

    That is where ranks alone were to meet a budget of memory, the loss that was measured on the
    held-back samples is above `VISIBLE`, and the least objective with fewer bits is at most half of
    that by ranks alone, and of the loss measured after refit, which gains most for ranks. Only
    layers that are stored as a whole are considered: more choice would predict less.
    """
    budget, losses, evidence = solution.budget, solution.losses, session.evidence
    if budget is None or budget.mem is None or budget.latency is not None:
        return None
    settings = session.settings
    if settings.precision != "keep" or settings.arithmetic != "keep":
        return None
    if losses is None or evidence is None:
        return None
    assert solution.calibration is not None
    quality = solution.calibration.quality
    if quality.drop <= VISIBLE[quality.measure]:
        return None
    analysis = session.analysis
    constraints = analysis.constraints(budget)
    responses = evidence.sensitivity(constraints).responses
    layers, both = [], []
    for index, (ranks, bits) in enumerate(zip(analysis.curves, session.bit_curves, strict=True)):
        known = [losses.curve(index, number) for number in range(len(ranks.curves))]
        if bits is not None:
            ranks = replace(ranks, curves=(*ranks.curves, bits))
            known.append(np.minimum.accumulate(responses[index](bits.errors)))
        layers.append(ranks)
        both.append(known)
    alone = allocate(analysis.curves, losses, constraints, solver="milp").certificate.value
    predicted = allocate(layers, OutputError(both), constraints, solver="milp").certificate.value
    worth = predicted <= WORTH * min(alone, solution.calibration.loss)
    return Forecast(predicted, alone) if worth else None


def forecast_note(told: Forecast) -> str:
    """Say a forecast in one line."""
    return (
        f"--precision auto predicts a loss of at most {told.predicted:.3g} at this budget, ranks "
        f"alone {told.ranks_alone:.3g} (sums over layers, before refit)"
    )
