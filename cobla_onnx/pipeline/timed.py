"""A latency budget: ranks are chosen in several ways and timed, and what loses least is taken.

What stands for the time while ranks are chosen is the table of layer times, or MACs; and nodes may
compute in 8 bits after that. None of them is best everywhere: the table is wrong about small
layers, MACs about expensive ones, and 8 bits gain nothing where layers are so small that to enter
and to leave them takes longer. So the best plan of each way is made whole and measured, unless it
loses so much more than another's before refit that no refit would help.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

from cobla_onnx.allocation import Budget
from cobla_onnx.errors import BudgetError, UsageError
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.ways import Choose, Found, Way, fast_enough, too_slow
from cobla_onnx.plan import Plan
from cobla_onnx.wording import option_name

if TYPE_CHECKING:
    from cobla_onnx.pipeline.session import Session, Solution

__all__ = ["check_arithmetic", "solve_in_time"]

# A refit leaves more of a loss than one part in so many: that of the demo model takes six parts of
# seven at a quarter of its bytes, that of ResNet-20 five of eight.
REFIT = 16.0


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
    made: list[tuple[Found, Solution]] = []
    left: list[_Left] = []
    refused: list[BudgetError] = []
    for each in _sessions(session):
        attempt = _Attempt(replace(each, seconds=session.seconds), budget, started, made)
        try:
            found = search.tried(attempt.way, budget, attempt.is_worth)
        except BudgetError as error:
            refused.append(error)
            continue
        finally:
            search.profile.keep()
        tried += found
        best = fast_enough(found, budget.latency)
        if best is None:
            continue
        if attempt.is_worth(best):
            made.append((best, attempt.solution(best, found)))
        else:
            left.append(_Left(best, attempt.loss(best), partial(attempt.solution, best, found)))
    if not made:
        raise too_slow(tried, budget.latency, search.stopwatch.threads) if tried else refused[0]
    made.sort(key=lambda entry: _loss(entry[1]))
    seconds = time.perf_counter() - started
    first, *others = (replace(solution, seconds=seconds) for _, solution in made)
    if (others or left) and first.allocation is not None:
        noted = first.allocation.noting(_note(made, left))
        first = replace(first, allocation=noted)
    known = [partial(_itself, solution) for solution in others]
    return replace(first, others=(*known, *(each.solution for each in left)))


class _Left(NamedTuple):
    """A plan that is fast enough, its loss before refit, and what makes the solution after all."""

    found: Found
    loss: float
    solution: Callable[[], Solution]


def _itself(solution: Solution) -> Solution:
    return solution


@dataclass(frozen=True)
class _Attempt:
    """One way to a latency budget.

    Attributes
    ----------
    session : Session
        In one arithmetic.
    budget : Budget
    started : float
        When the search for all ways began.
    made : list of (Found, Solution)
        What other ways came to.
    losses : dict of Plan to float
        Before refit, of the plans that were judged.
    """

    session: Session
    budget: Budget
    started: float
    made: list[tuple[Found, Solution]]
    losses: dict[Plan, float] = field(default_factory=dict)

    @cached_property
    def _finisher(self) -> Finisher | None:
        return None if self.session.evidence is None else self.session.evidence.finisher()

    @property
    def way(self) -> Way:
        return _way(self.session, self.budget, self.session.chooser(self._finisher))

    def loss(self, found: Found) -> float:
        """Loss of a plan before refit on the samples held back; 0 where that is not known."""
        if self._finisher is None:
            return 0.0
        plan = found.result.plan(self.session.analysis)
        if plan not in self.losses:
            weights = self._finisher.weights(plan)
            self.losses[plan] = self._finisher.judge.selection.loss(weights)
        return self.losses[plan]

    def is_worth(self, found: Found) -> bool:
        """Whether a plan may lose less than what other ways came to, once it is refitted."""
        if not self.made or self.session.settings.distil is not None:
            return True
        least = min(_loss(solution) for _, solution in self.made)
        return self.loss(found) <= REFIT * least

    def solution(self, best: Found, tried: Sequence[Found]) -> Solution:
        """Make the factors of a plan, and let it compute in 8 bits if this way does."""
        told = replace(
            best.result,
            predicted=best.predicted if best.way.proxy.name == "latency" else None,
            history=tuple(step for entry in tried for step in entry.result.history),
        )
        plan = told.plan(self.session.analysis)
        return self.session.completed(self.budget, told, plan, self._finisher, self.started)


def _sessions(session: Session) -> Iterator[Session]:
    """Return the session in each arithmetic that was asked for, by the table and by MACs.

    That in 8 bits is the first: it often loses so little that others need not be made.
    """
    arithmetic = session.settings.arithmetic
    by_macs = session.by_macs
    if arithmetic != "keep":
        yield (by_macs or session).computing("int8")
    if arithmetic != "int8":
        yield session.computing("keep")
        if by_macs is not None and by_macs.analysis.layers:
            yield by_macs.computing("keep")


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


def _note(made: Sequence[tuple[Found, Solution]], left: Sequence[_Left]) -> str:
    compared = [
        f"by {found.way.name}: {found.measured.ratio:.3f} of the time, loss {_loss(each):.4g}"
        for found, each in made
    ]
    compared += [
        f"by {found.way.name}: {found.measured.ratio:.3f} of the time, loss {loss:.4g} before "
        "refit, which was left out"
        for found, loss, _ in left
    ]
    name = made[0][0].way.name
    return f"ranks were chosen by {name}, as that loses least ({'; '.join(compared)})"
