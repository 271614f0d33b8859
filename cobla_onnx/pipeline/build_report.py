"""Build the report from the results of all stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cobla_onnx.allocation import Allocation, Budget, VariantCurve
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.graph.layers import Layer, Reason
from cobla_onnx.latency.timing import Comparison
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.report.model import (
    BudgetUse,
    CalibrationReport,
    Cost,
    LatencyReport,
    LayerLatency,
    LayerReport,
    Report,
    SolverReport,
    Spectrum,
    Spread,
    Verification,
)
from cobla_onnx.runtime.environment import machine, versions
from cobla_onnx.runtime.providers import current_provider
from cobla_onnx.variants.registry import require_family

__all__ = ["latency_report", "make_report"]

# Most singular values of a layer that are kept for drawing.
SPECTRUM_POINTS = 64


def make_report(
    analysis: Analysis,
    budget: Budget | None,
    plan: Plan,
    allocation: Allocation | None,
    verification: Verification | None,
    calibration: CalibrationReport | None,
    *,
    source: Path | None,
    mem_after: int,
    seconds: float,
    seed: int,
    threads: int,
    latency: LatencyReport | None = None,
    more_notes: tuple[str, ...] = (),
    command: str | None = None,
    history: Sequence[Step] = (),
) -> Report:
    """Return the report of a run; see `Report` for its fields."""
    unchanged = all(decision.scheme is None for decision in plan.decisions)
    decisions = {decision.layer: decision for decision in plan.decisions}
    layers = [
        _layer(analysis, index, decisions.get(layer.name, Decision(layer.name)), unchanged)
        for index, layer in enumerate(analysis.layers)
    ]
    layers.extend(
        LayerReport(
            name=item.name,
            op=item.op,
            shape=(),
            decision="skipped",
            scheme=None,
            rank=None,
            full_rank=None,
            params=Cost(item.params or None, item.params or None),
            macs=Cost(None, None),
            error=None,
            reason=str(item),
        )
        for item in analysis.skipped
    )
    notes = analysis.notes + more_notes
    if allocation is not None:
        notes += allocation.certificate.notes
    if verification is not None:
        notes += verification.notes
    if calibration is None:
        notes += (
            "no data was given: factors and ranks follow the weights alone; expect less accuracy",
        )
    limits = {} if budget is None else asdict(budget)
    return Report(
        input=None if source is None else str(source),
        output=None,
        budget={
            "mem": _use(limits.get("mem"), analysis.mem_total, mem_after),
            "mac": _use(limits.get("mac"), analysis.mac_total, analysis.macs_after(plan)),
            "latency": _time_use(limits.get("latency"), latency),
        },
        layers=tuple(layers),
        solver=None if allocation is None else _solver(allocation),
        verification=verification,
        calibration=calibration,
        seconds=seconds,
        seed=seed,
        threads=threads,
        unchanged=unchanged,
        versions=versions(),
        notes=notes,
        latency=latency,
        provider=current_provider(),
        machine=machine(),
        command=command,
        history=tuple(history),
    )


def latency_report(
    measured: Comparison,
    predicted: float | None,
    layers: Sequence[tuple[str, int, int]],
    threads: int,
) -> LatencyReport:
    """Return the report of measured times; those of layers are in nanoseconds."""
    return LatencyReport(
        threads=threads,
        provider=current_provider(),
        repeats=measured.repeats,
        before_ms=Spread(*measured.before),
        after_ms=Spread(*measured.after),
        ratio=measured.ratio,
        ratio_low=measured.low,
        ratio_high=measured.high,
        predicted_ratio=predicted,
        layers=tuple(LayerLatency(name, a / 1e6, b / 1e6) for name, a, b in layers),
    )


def _time_use(limit: float | None, latency: LatencyReport | None) -> BudgetUse:
    """Measured medians in nanoseconds."""
    if latency is None:
        return BudgetUse(limit, None, None, None)
    before, after = (round(1e6 * spread.median) for spread in (latency.before_ms, latency.after_ms))
    return BudgetUse(limit, latency.ratio, before, after)


def _use(limit: float | None, before: int | None, after: int | None) -> BudgetUse:
    reached = None if before is None or after is None else after / before if before else 1.0
    return BudgetUse(limit, reached, before, after)


def _layer(analysis: Analysis, index: int, decision: Decision, unchanged: bool) -> LayerReport:
    layer: Layer = analysis.layers[index]
    curves = analysis.curves[index].curves
    widest = max(curves, key=lambda curve: (curve.spectrum is not None, curve.most))
    full_rank = widest.most
    if decision.scheme is None or decision.rank is None:
        reason = Reason.MET if unchanged else Reason.BUDGET
        params = Cost(layer.params, layer.params)
        macs = Cost(analysis.macs[index], analysis.macs[index])
        return LayerReport(
            layer.name, layer.op, layer.shape, "whole", None, None, full_rank, params, macs, None,
            reason.value, _spectrum(widest),
        )  # fmt: skip
    _, form, level = analysis.resolve(decision)
    family = require_family(form.name)
    curve = analysis.curve(decision)
    error = None
    if curve is not None:
        error = float(np.sqrt(curve.errors[level]))
    return LayerReport(
        name=layer.name,
        op=layer.op,
        shape=layer.shape,
        decision=family.outcome,
        scheme=form.name,
        rank=level,
        full_rank=family.most(layer, form),
        params=Cost(layer.params, family.params(layer, form, level)),
        macs=Cost(analysis.macs[index], analysis.layer_macs(decision)),
        error=error,
        reason="",
        spectrum=None if curve is None else _spectrum(curve, level),
    )


def _spectrum(curve: VariantCurve, rank: int | None = None) -> Spectrum | None:
    """Thin out a curve's singular values; those next to the cut are always kept."""
    values = curve.spectrum
    largest = 0.0 if values is None else float(values.max(initial=0.0))
    if values is None or not largest > 0:
        return None
    edges = [] if rank is None else [rank, min(rank + 1, len(values))]
    chosen = np.linspace(1, len(values), SPECTRUM_POINTS - len(edges)).round()
    ranks = np.unique([*chosen, *edges]).astype(np.int64)
    relative = np.maximum(values[ranks - 1], 0.0) / largest
    return Spectrum(
        curve.scheme,
        tuple(ranks.tolist()),
        tuple(float(f"{value:.4g}") for value in relative.tolist()),
    )


def _solver(allocation: Allocation) -> SolverReport:
    proof = allocation.certificate
    return SolverReport(
        name=proof.solver,
        objective=proof.objective,
        value=proof.value,
        lower_bound=proof.lower_bound,
        gap=proof.gap,
        multipliers=dict(proof.multipliers),
        relaxed_value=proof.relaxed_value,
        kkt_residual=proof.kkt_residual,
        iterations=proof.iterations,
        variables=proof.variables,
        fronts=dict(proof.fronts),
    )
