"""Build the report from the results of all stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cobla_onnx.allocation import Allocation, VariantCurve
from cobla_onnx.graph.layers import Layer, Reason
from cobla_onnx.latency.timing import Comparison
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.data import MeasuredFactors
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.problem import SearchResult
from cobla_onnx.plan import Decision
from cobla_onnx.report.costs import Cost, Sizes
from cobla_onnx.report.model import (
    BudgetUse,
    CalibrationReport,
    Forecast,
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
from cobla_onnx.text import finite
from cobla_onnx.variants.coded_factors.form import split_name
from cobla_onnx.variants.registry import require_family
from cobla_onnx.wording import in_flags

if TYPE_CHECKING:
    from cobla_onnx.pipeline.session import Session, Solution

__all__ = ["Outcome", "calibration_report", "latency_report", "make_report"]

# Most singular values of a layer that are kept for drawing.
SPECTRUM_POINTS = 64


@dataclass(frozen=True)
class Outcome:
    """What became of a solution.

    Attributes
    ----------
    mem_after : int
        Bytes of the compressed model's weights.
    verification : Verification or None
        None where nothing was changed.
    latency : LatencyReport or None
    notes : tuple of str
    seconds : float
        Of the whole run.
    constants : Cost
        Bytes of the constants that a session holds.
    forecast : Forecast or None
    """

    mem_after: int
    verification: Verification | None
    latency: LatencyReport | None
    notes: tuple[str, ...]
    seconds: float
    constants: Cost
    forecast: Forecast | None = None


def make_report(session: Session, solution: Solution, outcome: Outcome) -> Report:
    """Return the report of a run; see `Report` for its fields."""
    analysis, plan = _reported_analysis(session, solution), solution.plan
    limits = {} if solution.budget is None else asdict(solution.budget)
    mac_after = analysis.macs_after(plan)
    return Report(
        input=None if session.source is None else str(session.source),
        output=None,
        budget={
            "mem": _use(limits.get("mem"), analysis.mem_total, outcome.mem_after),
            "mac": _use(limits.get("mac"), analysis.mac_total, mac_after),
            "latency": _time_use(limits.get("latency"), outcome.latency),
        },
        layers=_layers(analysis, solution),
        solver=None if solution.allocation is None else _solver(solution.allocation),
        verification=outcome.verification,
        calibration=solution.calibration,
        seconds=outcome.seconds,
        seed=session.settings.seed,
        threads=session.context.threads,
        unchanged=_unchanged(solution) and not analysis.mem_saved,
        versions=versions(),
        notes=_notes(analysis, solution, outcome),
        latency=outcome.latency,
        provider=current_provider(),
        machine=machine(),
        command=session.settings.call,
        history=solution.history,
        sizes=Sizes(session=outcome.constants),
        forecast=outcome.forecast,
        arithmetic=None if solution.eight_bits is None else solution.eight_bits.report,
    )


def _reported_analysis(session: Session, solution: Solution) -> Analysis:
    """Return the analysis with the errors and the notes that the report shows."""
    analysis, cache = session.analysis, session.context.cache
    if session.evidence is not None and solution.plan.factors == "weights":
        # The reported errors are those of the weights, which the factors approximate.
        analysis = analysis.with_curves(session.evidence.weight_curves)
    if cache is not None:
        notes = dict.fromkeys((*analysis.notes, *cache.notes))
        analysis = replace(analysis, notes=tuple(notes))
    return analysis


def _unchanged(solution: Solution) -> bool:
    plan = solution.plan
    return solution.eight_bits is None and all(d.scheme is None for d in plan.decisions)


def _notes(analysis: Analysis, solution: Solution, outcome: Outcome) -> tuple[str, ...]:
    notes = analysis.notes + outcome.notes
    if solution.allocation is not None:
        notes += solution.allocation.certificate.notes
    if outcome.verification is not None:
        notes += outcome.verification.notes
    if solution.eight_bits is not None:
        notes += solution.eight_bits.notes
    if solution.calibration is None:
        notes += (
            "no data was given: factors and ranks follow the weights alone; expect less accuracy",
        )
    return tuple(map(in_flags, notes))


def _layers(analysis: Analysis, solution: Solution) -> tuple[LayerReport, ...]:
    """Layers that may be compressed, then those that are skipped."""
    unchanged = _unchanged(solution)
    decisions = {decision.layer: decision for decision in solution.plan.decisions}
    layers = [
        _layer(analysis, index, decisions.get(layer.name, Decision(layer.name)), unchanged)
        for index, layer in enumerate(analysis.layers)
    ]
    layers = [
        replace(layer, predicted_loss=loss)
        for layer, loss in zip(layers, _predicted_losses(analysis, solution), strict=True)
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
    return tuple(layers)


def _predicted_losses(analysis: Analysis, solution: Solution) -> list[float | None]:
    """Return what the objective has for each layer alone; None where it has nothing for it.

    Without data the curves' errors are the objective. For given choices there is none, nor for
    factors of the weights alone where the objective is of those made from data.
    """
    plan, losses, found = solution.plan, solution.losses, dict[str, float]()
    if solution.allocation is None or (plan.factors == "weights" and losses is not None):
        return [None] * len(analysis.layers)
    index = {layer.name: number for number, layer in enumerate(analysis.layers)}
    for decision in plan.decisions:
        curve = None if decision.scheme is None else analysis.curve(decision)
        if curve is None:
            continue
        place, level = index[decision.layer], analysis.resolve(decision)[2]
        if losses is None:
            found[decision.layer] = float(curve.errors[level])
        else:
            curves = analysis.curves[place].curves
            number = next(k for k, other in enumerate(curves) if other is curve)
            found[decision.layer] = float(losses.curve(place, number)[level])
    return [found.get(layer.name) for layer in analysis.layers]


def calibration_report(
    evidence: Evidence, found: SearchResult | None, measured: MeasuredFactors
) -> CalibrationReport:
    """Return the report of the data, of a search if there was one, and of the factors."""
    dataset, judge, shown = evidence.dataset, evidence.judge, evidence.measured.shown
    # Records that are kept whole are batches.
    whole, selection = dataset.rows is None, judge.selection
    return CalibrationReport(
        source=dataset.source,
        calibration_samples=dataset.count(dataset.calibration),
        selection_samples=len(selection.batches) if whole else selection.samples,
        outputs={shown(name): m.kind for name, m in judge.measures.items()},
        temperatures={shown(name): t for name, t in judge.temperatures.items()},
        loss=measured.loss,
        loss_before_refit=measured.loss_before_refit,
        quality=measured.quality,
        refitted=measured.refitted,
        probe_samples=0 if found is None else found.probe_samples,
        candidates=() if found is None else tuple(map(finite, found.candidates)),
        rivals=() if found is None else found.rivals,
        distillation=measured.distillation,
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
    full_rank = None if widest.spectrum is None else widest.most
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
        scheme=split_name(form.name)[0],
        rank=level if family.level == "rank" else None,
        full_rank=family.most(layer, form) if family.level == "rank" else full_rank,
        params=Cost(layer.params, family.params(layer, form, level)),
        macs=Cost(analysis.macs[index], analysis.layer_macs(decision)),
        error=error,
        reason="",
        spectrum=None if curve is None else _spectrum(curve, level),
        bits=decision.bits,
        folded=decision.folded,
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
