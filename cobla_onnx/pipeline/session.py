"""A session: one analysis of a model, open for any number of budgets.

Analysing a model (second moments, singular values, sensitivities) takes most of the time and
does not depend on the budget. It is done once, by `open_session`. Each call of `Session.solve`
then finds ranks and factors for a budget, and `Session.finish` rewrites, verifies and reports.
What belongs to one budget is in the `Solution`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import onnx

from cobla_onnx.allocation import (
    Allocation,
    Budget,
    Constraint,
    SeparableError,
    VariantCurve,
)
from cobla_onnx.allocation.budget import least_fraction
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.order import Order
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.branches import Followed
from cobla_onnx.pipeline.budget_errors import explain
from cobla_onnx.pipeline.build_report import calibration_report
from cobla_onnx.pipeline.finish import finish
from cobla_onnx.pipeline.forecast import bit_curves
from cobla_onnx.pipeline.model_times import ModelTimes
from cobla_onnx.pipeline.result import Result
from cobla_onnx.pipeline.search.data import (
    distil_factors,
    draft_by_data,
    make_factors,
    measure_factors,
    search_by_data,
)
from cobla_onnx.pipeline.search.eight_bit_search import EightBits
from cobla_onnx.pipeline.search.eight_bits import in_eight_bits, spared_outputs
from cobla_onnx.pipeline.search.eight_bits_alone import EightBitsAlone
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.memory import EightBitMemory
from cobla_onnx.pipeline.search.output import sketch_by_output
from cobla_onnx.pipeline.search.problem import Problem, SearchResult
from cobla_onnx.pipeline.search.ways import Choose
from cobla_onnx.pipeline.search.weights import search_by_weights
from cobla_onnx.pipeline.timed import solve_in_time
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import CalibrationReport
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.footprint import constants_in_session
from cobla_onnx.runtime.progress import Progress, tracked
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankRule
from cobla_onnx.variants.offload import Spill
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.work import replacements_of
from cobla_onnx.variants.writing import Writing

__all__ = ["Session", "Solution"]


@dataclass(frozen=True)
class Solution:
    """Ranks and factors for a budget, not yet verified.

    Attributes
    ----------
    budget : Budget or None
        None where a plan was given without limits.
    plan : Plan
    allocation : Allocation or None
        None where the plan was given.
    replacements : list of Replacement
    spill : Spill
        Keeps factors on disk if they are too large for memory.
    calibration : CalibrationReport or None
    history : tuple of Step
    seconds : float
        Time that the search took.
    predicted : float, optional
        Predicted fraction of the original's running time, with a latency budget.
    losses : SeparableError, optional
        The separable model of the measured loss, see `SearchResult`.
    eight_bits : EightBits, optional
        The model with these factors whose nodes compute in 8 bits, if that was asked for.
    session : Session, optional
        The one whose layers the plan is of: a latency budget has one for each way of choosing
        (see `solve_in_time`), and its answer is finished by that one.
    others : tuple of callable
        They return those of other ways to a latency budget, by loss, or raise `BudgetError`: for
        when this one, finished and timed again, takes too long.
    """

    budget: Budget | None
    plan: Plan
    allocation: Allocation | None
    replacements: list[Replacement]
    spill: Spill
    calibration: CalibrationReport | None
    history: tuple[Step, ...]
    seconds: float
    predicted: float | None = None
    losses: SeparableError | None = None
    eight_bits: EightBits | None = None
    session: Session | None = field(default=None, repr=False, compare=False)
    others: tuple[Callable[[], Solution], ...] = ()


@dataclass(frozen=True)
class Session:
    """An analysed model, made by `open_session`.

    Attributes
    ----------
    given : ModelProto
        The model as it was read.
    single : ModelProto
        The same, but constants that it stored more than once are stored once.
    followed : Followed
        The model as it is written, and as the data sees it.
    analysis : Analysis
    settings : Settings
    context : RunContext
    evidence : Evidence or None
        None without data.
    times : ModelTimes or None
        Times of the model, if asked for.
    source : Path or None
        The model's file.
    order : Order
        Original places of the nodes, if they are not sorted in the file.
    rule : RankRule
        Decides the candidate ranks.
    seconds : float
        Time that the analysis took.
    by_macs : Session or None
        With a latency budget: the layers as a budget of MACs would have them, without times.
    eight_bits_alone : EightBitsAlone
        The model in 8 bits with all its ranks, where many budgets end.
    """

    given: onnx.ModelProto
    single: onnx.ModelProto
    followed: Followed
    analysis: Analysis
    settings: Settings
    context: RunContext
    evidence: Evidence | None = None
    times: ModelTimes | None = None
    source: Path | None = None
    order: Order = field(default_factory=dict, repr=False)
    rule: RankRule = EVERY_RANK
    seconds: float = 0.0
    by_macs: Session | None = field(default=None, repr=False)
    eight_bits_alone: EightBitsAlone = field(default_factory=EightBitsAlone, repr=False)

    @property
    def model(self) -> onnx.ModelProto:
        """What the layers are found in and measured on."""
        return self.followed.model

    @property
    def written(self) -> onnx.ModelProto:
        """What is written, with other weights."""
        return self.followed.original

    @property
    def notify(self) -> Progress:
        """Called with progress."""
        return self.context.progress

    @property
    def objective(self) -> Literal["weights", "output", "loss"]:
        """The objective that is minimised, with ``auto`` resolved."""
        return self.settings.resolved_objective

    @cached_property
    def constants(self) -> int | None:
        """Bytes of the constants that onnxruntime holds of the original; None if not measured."""
        return constants_in_session(self.written, self.context.threads)

    @cached_property
    def bit_curves(self) -> tuple[VariantCurve | None, ...]:
        """Curves of the layers in fewer bits, for forecasts; see `forecast.bit_curves`."""
        return bit_curves(self.model, self.analysis, self.context)

    def least_memory(self) -> float:
        """Least feasible fraction of memory, rounded up so that it is itself feasible.

        In 8 bits it is an estimate.
        """
        (constraint,) = self.analysis.constraints(Budget(mem=1.0))
        least = least_fraction(constraint, self.analysis.curves)
        if self.settings.arithmetic == "int8":
            # About: budgets below the true one are refused when they are tried.
            least *= self.eight_bit_memory.original / self.analysis.mem_total
        return least

    def compress(self, budget: Budget | None, plan: Plan | None = None) -> Result:
        """Find ranks and factors for a budget, verify the result and report.

        Raises
        ------
        BudgetError, VerificationError, UsageError
        """
        return self.finish(self.solve(budget, plan))

    def finish(self, solution: Solution) -> Result:
        """Rewrite the model, count its costs again, verify it and report.

        Raises
        ------
        BudgetError
            If a given plan is over the budget, or all of the solution's ways take too long.
        VerificationError
        """
        try:
            return finish(solution.session or self, solution)
        except BudgetError as error:
            following = _following(solution, error)
        return self.finish(following)

    def solve(self, budget: Budget | None, plan: Plan | None = None) -> Solution:
        """Find ranks, unless a plan gives them, and factors.

        Raises
        ------
        BudgetError
            If the budget cannot be met.
        UsageError
            If the plan does not fit the model.
        """
        started = time.perf_counter()
        finisher = None if self.evidence is None else self.evidence.finisher()
        if plan is not None:
            return self.completed(budget, None, self.analysis.taking(plan), finisher, started)
        assert budget is not None
        try:
            if budget.latency is not None and self.times is not None:
                return solve_in_time(self, budget)
            found = self._by_costs(budget, self.chooser(finisher))
        except BudgetError as error:
            raise explain(error, self.written, self.analysis, self.settings, self.rule) from error
        return self.completed(budget, found, found.plan(self.analysis), finisher, started)

    def computing(self, arithmetic: Literal["keep", "int8"]) -> Session:
        """Return the session in one arithmetic, where several were asked for."""
        return replace(self, settings=replace(self.settings, arithmetic=arithmetic))

    def chooser(self, finisher: Finisher | None) -> Choose:
        """Return what chooses ranks within constraints.

        Parameters
        ----------
        finisher : Finisher or None
            Of this session's evidence; None without data.
        """
        if self.evidence is None or finisher is None or self.objective == "weights":
            return self._choose_by_weights
        return partial(search_by_data, self._problem, self.evidence, finisher)

    @property
    def quicker(self) -> tuple[Choose | None, Choose | None]:
        """What chooses about the same in no time, and the same compared with no other answer.

        None where choosing takes no time.
        """
        if self.evidence is None or self.objective == "weights":
            return None, None
        given = self._problem, self.evidence
        return partial(sketch_by_output, *given), partial(draft_by_data, *given)

    def completed(
        self,
        budget: Budget | None,
        found: SearchResult | None,
        plan: Plan,
        finisher: Finisher | None,
        started: float,
    ) -> Solution:
        """Make the factors of a plan, and let nodes compute in 8 bits if that was asked for."""
        spill, calibration, eight_bits = Spill(), None, None
        if self.evidence is None or finisher is None:
            replacements = spill.replacements(self._written(plan, self._replacements(plan)))
        else:
            factors = make_factors(finisher, plan, self.settings.refit)
            factors = distil_factors(self.evidence, finisher, plan, factors, self.settings)
            measured = measure_factors(self.evidence, factors)
            replacements = spill.replacements(self._written(plan, measured.replacements))
            calibration = calibration_report(self.evidence, found, measured)
            if self.settings.arithmetic == "int8":
                head = None if found is None else found.head
                eight_bits = self._quantised(self.evidence, budget, replacements, head)
                quality = eight_bits.report.quality
                calibration = replace(calibration, loss=eight_bits.report.loss, quality=quality)
        return Solution(
            budget=budget,
            plan=plan,
            allocation=None if found is None else found.allocation,
            replacements=replacements,
            spill=spill,
            calibration=calibration,
            history=() if found is None else found.history,
            seconds=time.perf_counter() - started,
            predicted=None if found is None else found.predicted,
            losses=None if found is None else found.losses,
            eight_bits=eight_bits,
            session=self,
        )

    def _quantised(
        self,
        evidence: Evidence,
        budget: Budget | None,
        replacements: list[Replacement],
        head: int | None,
    ) -> EightBits:
        """Let the model with these replacements compute in 8 bits."""
        model = self.followed.rewritten(replacements)
        most = latency = None
        if budget is not None and budget.mem is not None:
            most = self.analysis.limits(Budget(mem=budget.mem))["mem"]
        if budget is not None and self.times is not None:
            latency = budget.latency
        spared = spared_outputs(self.model, self.analysis)

        def ratio(narrow: onnx.ModelProto) -> float:
            assert self.times is not None
            return self.times.search.compare(narrow).ratio

        kept = EightBitsAlone() if replacements else self.eight_bits_alone
        make = partial(in_eight_bits, evidence, model, most, spared, head)
        return kept.once((most, head), latency, ratio, make)

    def _by_costs(self, budget: Budget, choose: Choose) -> SearchResult:
        def search(limits: Budget) -> SearchResult:
            return choose(self.analysis.constraints(limits))

        if self.settings.arithmetic == "int8" and budget.mem is not None:
            return self.eight_bit_memory.meet(budget, search)
        return search(budget)

    @cached_property
    def eight_bit_memory(self) -> EightBitMemory:
        """Counts the bytes of the model in 8 bits."""
        return EightBitMemory(self.followed, self.analysis, self.settings.storage)

    @property
    def _problem(self) -> Problem:
        settings = self.settings
        return Problem(
            self.analysis, settings.solver, self.objective, settings.refit, settings.time_limit
        )

    def _choose_by_weights(self, constraints: Sequence[Constraint]) -> SearchResult:
        self.notify("allocate", 0, 1)
        return search_by_weights(self._problem, constraints)

    def _written(self, plan: Plan, made: Iterable[Replacement]) -> Iterator[Replacement]:
        """Choose how codes are written, and fold what is folded in the plan."""
        writing = Writing.into(self.model, self.settings.storage)
        return (replacement.written(writing) for replacement in _as_planned(plan, made))

    def _replacements(self, plan: Plan) -> Iterator[Replacement]:
        """Approximate the weights of the chosen layers over the pool; yield them one by one."""
        chosen = [self.analysis.resolve(d) for d in plan.decisions if d.scheme is not None]
        made = replacements_of(self.model, chosen, self.context)
        yield from tracked(made, len(chosen), partial(self.notify, "factorise"))


def _following(solution: Solution, error: BudgetError) -> Solution:
    """Return the solution of the next way that has one; raise the error where there is none."""
    for number, make in enumerate(solution.others, 1):
        try:
            found = make()
        except BudgetError:
            # It was left out before it was timed, and would take too long as well.
            continue
        if found.allocation is not None:
            note = f"not the plan that loses least, of which {error.in_flags()}"
            found = replace(found, allocation=found.allocation.noting(note))
        return replace(found, others=solution.others[number:])
    raise error


def _as_planned(plan: Plan, replacements: Iterable[Replacement]) -> Iterator[Replacement]:
    """Write what replaces layers, in the order of a plan, as it says."""
    decisions = (decision for decision in plan.decisions if decision.scheme is not None)
    for decision, replacement in zip(decisions, replacements, strict=True):
        yield replacement.as_folded() if decision.folded else replacement
