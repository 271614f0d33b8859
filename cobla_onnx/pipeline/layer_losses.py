"""What each layer loses for the bytes that it gives, by ranks and by bits."""

from __future__ import annotations

import numpy as np

from cobla_onnx.allocation import Budget
from cobla_onnx.pipeline.levers import Lever, levers_of, losses_of
from cobla_onnx.pipeline.session import Session
from cobla_onnx.report.sensitivity import LayerSensitivity, LeverLoss, Sensitivity
from cobla_onnx.variants.coded_factors.form import split_name

__all__ = ["layer_losses"]

# Shares of its bytes that a layer keeps at most. Where ranks halve a layer, the loss begins to
# count. Bits hardly lose there: at a fifth, 8 bits are not enough for single precision.
KEPT = {"ranks": 0.5, "bits": 0.2}


def layer_losses(session: Session) -> Sensitivity:
    """Return the layers by their loss for each byte.

    The session must compare families, with ``precision="auto"``.
    """
    analysis = session.analysis
    losses, samples = losses_of(session, analysis.constraints(Budget(mem=1.0)))
    levers = levers_of(session, losses)
    found = {name: _by_layer(levers[name], kept) for name, kept in KEPT.items()}
    layers = [
        LayerSensitivity(
            layer.name,
            layer.op,
            layer.stored_bytes,
            found["ranks"].get(layer.name),
            found["bits"].get(layer.name),
        )
        for layer in analysis.layers
    ]
    return Sensitivity(
        measured_by="weights" if session.evidence is None else "loss",
        samples=samples,
        kept=dict(KEPT),
        layers=tuple(sorted(layers, key=lambda layer: (-_of(layer.ranks), -_of(layer.bits)))),
    )


def _of(found: LeverLoss | None) -> float:
    return -1.0 if found is None else found.per_megabyte


def _by_layer(lever: Lever, kept: float) -> dict[str, LeverLoss]:
    found = {layer.name: _least(lever, index, kept) for index, layer in enumerate(lever.layers)}
    return {name: loss for name, loss in found.items() if loss is not None}


def _least(lever: Lever, index: int, kept: float) -> LeverLoss | None:
    """Return what loses least within a share of a layer's bytes; None if nothing is within it."""
    layer = lever.layers[index]
    whole = layer.costs["mem"]
    best: LeverLoss | None = None
    for number, curve in enumerate(layer.curves):
        within = np.flatnonzero(curve.costs["mem"] <= kept * whole)
        if not len(within):
            continue
        losses = lever.losses.curve(index, number)[curve.levels[within]]
        # Of equal losses the cheapest: levels ascend with their costs.
        place = within[int(losses.argmin())]
        loss, saved = float(losses.min()), whole - int(curve.costs["mem"][place])
        if best is None or loss < best.loss:
            level = int(curve.levels[place])
            best = LeverLoss(_variant(curve.scheme, level), loss, saved, loss / saved * 1e6)
    return best


def _variant(scheme: str, level: int) -> str:
    return f"{split_name(scheme)[0]} {level}"
