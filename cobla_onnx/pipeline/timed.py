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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

from cobla_onnx.allocation import Budget
from cobla_onnx.errors import BudgetError, UsageError
from cobla_onnx.latency.timing import Comparison
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.search.aims import Aims
from cobla_onnx.pipeline.search.eight_bits import can_compute, spared_outputs
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.problem import SearchResult
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
    sessions = _sessions(session)
    for each in sessions:
        attempt = _Attempt(replace(each, seconds=session.seconds), budget, started, made)
        hopeless = attempt.without_time()
        if hopeless is not None:
            left.append(hopeless)
            continue
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
            left.append(attempt.left(best))
    if not made:
        raise too_slow(tried, budget.latency, search.stopwatch.threads) if tried else refused[0]
    made.sort(key=lambda entry: _loss(entry[1]))
    seconds = time.perf_counter() - started
    first, *others = (replace(solution, seconds=seconds) for _, solution in made)
    if (others or left) and first.allocation is not None:
        noted = first.allocation.noting(_note(made, left))
        first = replace(first, allocation=noted)
    arithmetics = {each.settings.arithmetic for each in sessions}
    if session.settings.arithmetic == "auto" and "int8" not in arithmetics and first.allocation:
        note = "nothing computes in 8 bits: no node has a stored weight in single precision for it"
        first = replace(first, allocation=first.allocation.noting(note))
    left.sort(key=lambda each: each.loss)
    known = [partial(_itself, solution) for solution in others]
    return replace(first, others=(*known, *(each.solution for each in left)))


class _Left(NamedTuple):
    """A way that loses too much before refit, and what makes its solution after all.

    Attributes
    ----------
    name : str
        Of the way.
    measured : Comparison or None
        Time of its plan; None where it was not timed.
    loss : float
        Of its plan before refit.
    solution : callable
        Searches as if there was no other way; may raise `BudgetError`.
    """

    name: str
    measured: Comparison | None
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

    @cached_property
    def way(self) -> Way:
        return _way(self.session, self.budget, self.session.chooser(self._finisher))

    def loss(self, result: SearchResult) -> float:
        """Loss of a plan before refit on the samples held back; 0 where that is not known."""
        if self._finisher is None:
            return 0.0
        plan = result.plan(self.session.analysis)
        if plan not in self.losses:
            weights = self._finisher.weights(plan)
            self.losses[plan] = self._finisher.judge.selection.loss(weights)
        return self.losses[plan]

    def is_worth(self, found: Found) -> bool:
        """Whether a plan may lose less than what other ways came to, once it is refitted."""
        return self._is_worth(found.result)

    def _is_worth(self, result: SearchResult) -> bool:
        if not self.made or self.session.settings.distil is not None:
            return True
        least = min(_loss(solution) for _, solution in self.made)
        return self.loss(result) <= REFIT * least

    def without_time(self) -> _Left | None:
        """Leave the way out before anything is timed, if it can be seen to lose too much.

        Judged is what it would choose if the time fell as what stands for it does, which is to hope
        for much.
        """
        assert self.budget.latency is not None
        way = self.way
        if not self.made or way.eight_bits or way.sketch is None:
            return None
        aims = Aims(way.proxy, self.budget.latency, 1.0)
        try:
            first = way.sketch([*way.others, aims.first()])
        except BudgetError:
            # What stands for the time may be wrong: let the search find out.
            return None
        if self._is_worth(first):
            return None
        return _Left(way.name, None, self.loss(first), self._after_all)

    def left(self, best: Found) -> _Left:
        """Leave out a plan that is fast enough, which may be a sketch of what this way would do."""
        return _Left(best.way.name, best.measured, self.loss(best.result), self._after_all)

    def _after_all(self) -> Solution:
        """Search as if there was no other way."""
        assert self.budget.latency is not None
        assert self.session.times is not None
        search = self.session.times.search
        found = search.tried(self.way, self.budget)
        best = fast_enough(found, self.budget.latency)
        if best is None:
            raise too_slow(found, self.budget.latency, search.stopwatch.threads)
        return self.solution(best, found)

    def solution(self, best: Found, tried: Sequence[Found]) -> Solution:
        """Make the factors of a plan, and let it compute in 8 bits if this way does."""
        told = replace(
            best.result,
            predicted=best.predicted if best.way.proxy.name == "latency" else None,
            history=tuple(step for entry in tried for step in entry.result.history),
        )
        plan = told.plan(self.session.analysis)
        return self.session.completed(self.budget, told, plan, self._finisher, self.started)


def _sessions(session: Session) -> list[Session]:
    """Return the session in each arithmetic that was asked for, by the table and by MACs.

    That in 8 bits is the first: it often loses so little that others need not be made. It is left
    out where the arithmetic is to be chosen, and nothing can compute in 8 bits.
    """
    arithmetic = session.settings.arithmetic
    by_macs = session.by_macs
    found: list[Session] = []
    narrow = arithmetic == "int8"
    if arithmetic == "auto":
        narrow = can_compute(session.model, spared_outputs(session.model, session.analysis))
    if narrow:
        found.append((by_macs or session).computing("int8"))
    if arithmetic != "int8":
        found.append(session.computing("keep"))
        if by_macs is not None and by_macs.analysis.layers:
            found.append(by_macs.computing("keep"))
    return found


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
    return Way(name, analysis, proxy, others, choose, eight_bits, *session.quicker)


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
    for name, measured, loss, _ in left:
        timed = "not timed" if measured is None else f"{measured.ratio:.3f} of the time"
        compared.append(f"by {name}: {timed}, loss {loss:.4g} before refit, which was left out")
    best = made[0][0].way.name
    return f"ranks were chosen by {best}, as that loses least ({'; '.join(compared)})"
