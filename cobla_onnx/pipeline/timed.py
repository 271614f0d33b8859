"""A latency budget: ranks are chosen in several ways and timed, and what loses least is taken.

What stands for the time while ranks are chosen is the table of layer times, or MACs; and nodes may
compute in 8 bits after that. None of them is best everywhere: the table is wrong about small
layers, MACs about expensive ones, and 8 bits gain nothing where layers are so small that to enter
and to leave them takes longer. So the best plan of each way is made whole and measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from cobla_onnx.allocation import Budget
from cobla_onnx.errors import BudgetError, UsageError
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.search.ways import Choose, Found, Way, fast_enough, too_slow
from cobla_onnx.wording import option_name

if TYPE_CHECKING:
    from cobla_onnx.pipeline.session import Session, Solution

__all__ = ["check_arithmetic", "solve_in_time"]


def check_arithmetic(settings: Settings, timed: bool, planned: bool = False) -> None:
    """Refuse to choose an arithmetic for a plan, and for budgets that do not all limit the time.

    Raises
    ------
    UsageError
    """
    if settings.arithmetic == "auto" and planned:
        raise UsageError(
            f"{option_name('arithmetic', 'auto')}: is chosen with the ranks, which a plan gives; "
            f"give {option_name('arithmetic', 'int8')}, or leave out the plan"
        )
    if settings.arithmetic == "auto" and not timed:
        raise UsageError(
            f"{option_name('arithmetic', 'auto')}: is chosen by measured times; give "
            f"{option_name('latency')}, or {option_name('arithmetic', 'int8')}"
        )


def solve_in_time(session: Session, budget: Budget) -> Solution:
    """Find ranks and factors that meet a latency budget, and what computes in 8 bits.

    Parameters
    ----------
    session : Session
        With times.
    budget : Budget
        With a latency limit.

    Raises
    ------
    BudgetError
        If no plan of any way is fast enough, or other budgets cannot be met.
    """
    assert budget.latency is not None
    assert session.times is not None
    search, started = session.times.search, time.perf_counter()
    tried: list[Found] = []
    solutions: list[tuple[Found, Solution]] = []
    refused: list[BudgetError] = []
    for each in _sessions(session):
        finisher = None if each.evidence is None else each.evidence.finisher()
        try:
            found = search.tried(_way(each, budget, each.chooser(finisher)), budget)
        except BudgetError as error:
            refused.append(error)
            continue
        finally:
            search.profile.keep()
        tried += found
        best = fast_enough(found, budget.latency)
        if best is not None:
            told = replace(
                best.result,
                predicted=best.predicted if best.way.proxy.name == "latency" else None,
                history=tuple(step for entry in found for step in entry.result.history),
            )
            plan = told.plan(each.analysis)
            made = replace(each, seconds=session.seconds)
            solutions.append((best, made.completed(budget, told, plan, finisher, started)))
    if not solutions:
        raise too_slow(tried, budget.latency, search.stopwatch.threads) if tried else refused[0]
    solutions.sort(key=lambda entry: _loss(entry[1]))
    seconds = time.perf_counter() - started
    first, *others = (replace(solution, seconds=seconds) for _, solution in solutions)
    if others and first.allocation is not None:
        noted = first.allocation.noting(_note(solutions[0][0], solutions))
        first = replace(first, allocation=noted)
    return replace(first, others=tuple(others))


def _sessions(session: Session) -> Iterator[Session]:
    """Return the session in each arithmetic that was asked for, by the table and by MACs."""
    arithmetic = session.settings.arithmetic
    by_macs = session.by_macs
    if arithmetic != "int8":
        yield session.computing("keep")
        if by_macs is not None and by_macs.analysis.layers:
            yield by_macs.computing("keep")
    if arithmetic != "keep":
        yield (by_macs or session).computing("int8")


def _way(session: Session, budget: Budget, choose: Choose) -> Way:
    analysis, eight_bits = session.analysis, session.settings.arithmetic == "int8"
    if eight_bits and budget.mem is not None:
        budget = replace(budget, mem=session.eight_bit_memory.in_floats(budget.mem))
    if analysis.time_total is None:
        by_macs = replace(budget, latency=None, mac=budget.mac or 1.0)
        constraints = {c.name: c for c in analysis.constraints(by_macs)}
        proxy, name = constraints.pop("mac"), "MACs"
    else:
        constraints = {c.name: c for c in analysis.constraints(budget)}
        proxy = constraints.pop("latency")
        proxy, name = replace(proxy, limit=proxy.total), "the table of layer times"
    name += ", then 8 bits" if eight_bits else ""
    others = tuple(constraints.values())
    return Way(name, analysis, proxy, others, choose, eight_bits, session.sketcher)


def _loss(solution: Solution) -> float:
    """Loss on the samples held back; without data, what the programme minimised."""
    if solution.calibration is not None:
        loss = solution.calibration.loss
        return loss if math.isfinite(loss) else math.inf
    assert solution.allocation is not None
    return solution.allocation.certificate.value


def _note(best: Found, solutions: list[tuple[Found, Solution]]) -> str:
    compared = "; ".join(
        f"by {found.way.name}: {found.measured.ratio:.3f} of the time, loss {_loss(each):.4g}"
        for found, each in solutions
    )
    return f"ranks were chosen by {best.way.name}, as that loses least ({compared})"
