"""From a solution to a result: rewrite the model, verify it, time it and report."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx

from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.external import is_external
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.order import restore_order
from cobla_onnx.pipeline.budget_errors import elsewhere_note
from cobla_onnx.pipeline.build_report import Outcome, make_report
from cobla_onnx.pipeline.forecast import forecast, forecast_note
from cobla_onnx.pipeline.opening_proof import prove_opening
from cobla_onnx.pipeline.result import Result
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.verification import verify
from cobla_onnx.report.costs import Cost
from cobla_onnx.report.model import LatencyReport, Verification
from cobla_onnx.runtime.footprint import constants_in_session
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.wording import option_name

if TYPE_CHECKING:
    from cobla_onnx.pipeline.session import Session, Solution

__all__ = ["finish"]

# Most samples in a batch on which the rewrite is checked: every position of a few tells what those
# of many do, and neither model is optimised there.
PROVED_TOGETHER = 4


def finish(session: Session, solution: Solution) -> Result:
    """Rewrite the model, count its costs again, verify it and report; see `Session.finish`."""
    started = time.perf_counter()
    rewritten = _rewritten(session, solution)
    compressed = rewritten if solution.eight_bits is None else solution.eight_bits.model
    _check_budget(session, solution, compressed)
    verification = _verified(session, solution, rewritten)
    latency, of_time = _timed(session, solution, compressed)
    measured = () if session.evidence is None else session.evidence.measured.notes
    elsewhere = elsewhere_note(session.written, session.analysis, solution.budget)
    constants = _constants(session, compressed)
    seconds = session.seconds + solution.seconds + time.perf_counter() - started
    told = forecast(session, solution)
    told_of = [] if told is None else [forecast_note(told)]
    notes = (*measured, *of_time, *elsewhere, *told_of, *_not_dequantized(session, solution))
    outcome = Outcome(
        stored_bytes(compressed), verification, latency, notes, seconds, constants, told
    )
    report = make_report(session, solution, outcome)
    return Result(
        # All checks are done: put the nodes back in the order of the file.
        _in_order(session, compressed),
        solution.plan,
        report,
        session.source,
        solution.spill,
        any(map(is_external, session.written.graph.initializer)),
        solution.history,
    )


def _rewritten(session: Session, solution: Solution) -> onnx.ModelProto:
    session.notify("rewrite", 0, 1)
    compressed = session.followed.rewritten(solution.replacements)
    session.notify("rewrite", 1, 1)
    return compressed


def _check_budget(session: Session, solution: Solution, compressed: onnx.ModelProto) -> None:
    """Count the costs of the result again: budgets are hard. Times are measured elsewhere."""
    budget, analysis = solution.budget, session.analysis
    if budget is None or (budget.mem is None and budget.mac is None):
        return
    reached = {"mem": stored_bytes(compressed), "mac": analysis.macs_after(solution.plan)}
    for name, limit in analysis.limits(replace(budget, latency=None)).items():
        cost = reached[name]
        if cost is None or cost > limit:
            if solution.eight_bits is not None and solution.allocation is not None:
                raise BudgetError(
                    f"{option_name(name)}: with nodes in 8 bits the result costs {cost}, more than "
                    f"the search had counted, and the budget allows {limit}; raise the budget"
                )
            raise BudgetError(
                f"{option_name(name)}: the plan costs {cost}, the budget allows {limit}; "
                "lower its ranks or raise the budget"
            )


def _not_dequantized(session: Session, solution: Solution) -> tuple[str, ...]:
    """Say so if DequantizeLinear was asked for, and no layer reads it.

    In 8-bit arithmetic all nodes do.
    """
    made = solution.replacements
    asked = session.settings.storage == "qdq" and made and solution.eight_bits is None
    if not asked or any(r.optimized_tolerance is not None for r in made):
        return ()
    return (
        f"{option_name('storage', 'qdq')}: no layer is dequantised: none is in 8 bits with one "
        "scale, or (from opset 13 on) one along an axis; all are written as with auto",
    )


def _verified(
    session: Session, solution: Solution, rewritten: onnx.ModelProto
) -> Verification | None:
    """Verify the result on the samples held back, or on random inputs."""
    if not solution.replacements and solution.eight_bits is None:
        # What is written is the file, but for constants that are stored once.
        _prove_opened(session, session.single)
        return None
    evidence = session.evidence
    steps = 1 if evidence is None else _held_back_batches(evidence)

    def held_back() -> Iterable[tuple[int, Feeds]]:
        assert evidence is not None
        dataset = evidence.dataset
        return dataset.counted(dataset.selection, evidence.judge.batch)

    def proved() -> Iterable[Feeds]:
        assert evidence is not None
        samples = evidence.dataset.selection
        return evidence.dataset.batches(samples, min(evidence.judge.batch, PROVED_TOGETHER))

    session.notify("verify", 0, steps)
    _prove_opened(session, session.written)
    verification = verify(
        session.written,
        rewritten,
        session.followed.for_writing(solution.replacements),
        session.analysis.input_shapes,
        quantised=None if solution.eight_bits is None else solution.eight_bits.model,
        data=None if evidence is None else ("held-back", held_back),
        proved=None if evidence is None else proved,
        measures=None if evidence is None else evidence.judge.measures,
        taps=None if evidence is None else evidence.taps,
        seed=session.settings.seed,
        threads=session.context.threads,
        progress=lambda done: session.notify("verify", min(done, steps - 1), steps),
    )
    session.notify("verify", steps, steps)
    return verification


def _prove_opened(session: Session, model: onnx.ModelProto) -> None:
    """Compare a model that layers are found in, or written as it is, with the file."""
    if model is session.given:
        return
    prove_opening(
        session.given,
        model,
        session.analysis.input_shapes,
        None if session.evidence is None else session.evidence.dataset,
        session.settings.seed,
        session.context.threads,
    )


def _held_back_batches(evidence: Evidence) -> int:
    """About how many batches there are of the samples held back; more where shapes differ."""
    return max(1, -(-len(evidence.dataset.selection) // evidence.judge.batch))


def _timed(
    session: Session, solution: Solution, compressed: onnx.ModelProto
) -> tuple[LatencyReport | None, tuple[str, ...]]:
    """Time the result, if times were asked for; also return notes."""
    if session.times is None:
        return None, ()
    limit = None if solution.budget is None else solution.budget.latency
    plan = solution.plan if solution.eight_bits is None else None
    seen = session.followed.as_seen(compressed)
    return session.times.report(seen, plan, limit, solution.predicted)


def _constants(session: Session, compressed: onnx.ModelProto) -> Cost:
    """Bytes of the constants in a session of the original and of the result."""
    before = session.constants
    if compressed is session.written or before is None:
        return Cost(before, before)
    return Cost(before, constants_in_session(compressed, session.context.threads))


def _in_order(session: Session, compressed: onnx.ModelProto) -> onnx.ModelProto:
    """Put the nodes in the order of the file; the session's own model stays sorted.

    Where nothing has changed, the model is as it was given.
    """
    if compressed is session.written:
        compressed = session.single
        if session.order:
            compressed = onnx.ModelProto()
            compressed.CopyFrom(session.single)
    restore_order(compressed.graph, session.order)
    return compressed
