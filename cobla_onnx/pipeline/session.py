"""A session: one analysis of a model, open for any number of budgets.

Analysing a model (second moments, singular values, sensitivities) takes most of the time and
does not depend on the budget. It is done once, by `open_session`. Each call of `Session.solve`
then finds ranks and factors for a budget, and `Session.finish` rewrites, verifies and reports.
A session keeps nothing of a budget: what belongs to one is in the `Solution`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
from cobla_onnx.pipeline.budget_errors import explain
from cobla_onnx.pipeline.build_report import calibration_report
from cobla_onnx.pipeline.finish import finish
from cobla_onnx.pipeline.forecast import bit_curves
from cobla_onnx.pipeline.model_times import ModelTimes, search_by_latency
from cobla_onnx.pipeline.result import Result
from cobla_onnx.pipeline.search.data import (
    Factors,
    MeasuredFactors,
    make_factors,
    measure_factors,
    search_by_data,
)
from cobla_onnx.pipeline.search.evidence import Evidence
from cobla_onnx.pipeline.search.latency import Choose
from cobla_onnx.pipeline.search.problem import Problem, SearchResult
from cobla_onnx.pipeline.search.weights import search_by_weights
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


@dataclass(frozen=True)
class Session:
    """An analysed model, made by `open_session`.

    Attributes
    ----------
    model : ModelProto
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
    """

    model: onnx.ModelProto
    analysis: Analysis
    settings: Settings
    context: RunContext
    evidence: Evidence | None = None
    times: ModelTimes | None = None
    source: Path | None = None
    order: Order = field(default_factory=dict, repr=False)
    rule: RankRule = EVERY_RANK
    seconds: float = 0.0

    @property
    def notify(self) -> Progress:
        """Called with progress."""
        return self.context.progress

    @property
    def objective(self) -> Literal["weights", "output", "loss"]:
        """The objective that is minimised, with ``auto`` resolved."""
        return self.settings.needed

    @cached_property
    def constants(self) -> int | None:
        """Bytes of the constants that onnxruntime holds of the original; None if not measured."""
        return constants_in_session(self.model, self.context.threads)

    @cached_property
    def bit_curves(self) -> tuple[VariantCurve | None, ...]:
        """Curves of the layers in fewer bits, for forecasts; see `forecast.bit_curves`."""
        return bit_curves(self.model, self.analysis, self.context)

    def least_memory(self) -> float:
        """Least feasible fraction of memory, rounded up so that it is itself feasible."""
        (constraint,) = self.analysis.constraints(Budget(mem=1.0))
        return least_fraction(constraint, self.analysis.curves)

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
            If a given plan is over the budget.
        VerificationError
        """
        return finish(self, solution)

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
        found, plan, measured = self._decide(budget, plan)
        spill, calibration = Spill(), None
        if self.evidence is None or measured is None:
            replacements = spill.replacements(self._written(self._replacements(plan)))
        else:
            replacements = spill.replacements(self._written(measured.replacements))
            calibration = calibration_report(self.evidence, found, measured)
        return Solution(
            budget,
            plan,
            None if found is None else found.allocation,
            replacements,
            spill,
            calibration,
            () if found is None else found.history,
            time.perf_counter() - started,
            None if found is None else found.predicted,
            None if found is None else found.losses,
        )

    def _decide(
        self, budget: Budget | None, plan: Plan | None
    ) -> tuple[SearchResult | None, Plan, MeasuredFactors | None]:
        """Find ranks, unless a plan gives them, and factors if they are made from data."""
        if self.evidence is not None:
            found, plan, factors = self._decide_by_data(self.evidence, budget, plan)
            return found, plan, measure_factors(self.evidence, factors)
        if plan is not None:
            return None, plan, None
        found = self._search(budget, self._choose_by_weights)
        return found, found.plan(self.analysis), None

    def _decide_by_data(
        self, evidence: Evidence, budget: Budget | None, plan: Plan | None
    ) -> tuple[SearchResult | None, Plan, Factors]:
        # The finisher ends with this call: what it keeps is as large as the weights.
        finisher = evidence.finisher()
        found = None
        if plan is None:
            by_data = partial(search_by_data, self._problem, evidence, finisher)
            weights_alone = self.objective == "weights"
            found = self._search(budget, self._choose_by_weights if weights_alone else by_data)
            plan = found.plan(self.analysis)
        return found, plan, make_factors(finisher, plan, self.settings.refit)

    def _search(self, budget: Budget | None, choose: Choose) -> SearchResult:
        """Choose ranks for a budget, by measured times where it limits them."""
        assert budget is not None
        try:
            if budget.latency is None or self.times is None:
                return choose(self.analysis.constraints(budget))
            return search_by_latency(self.times.search, self.analysis, budget, choose)
        except BudgetError as error:
            raise explain(error, self.model, self.analysis, self.settings, self.rule) from error

    @property
    def _problem(self) -> Problem:
        settings = self.settings
        return Problem(
            self.analysis, settings.solver, settings.needed, settings.refit, settings.time_limit
        )

    def _choose_by_weights(self, constraints: Sequence[Constraint]) -> SearchResult:
        self.notify("allocate", 0, 1)
        return search_by_weights(self._problem, constraints)

    def _written(self, made: Iterable[Replacement]) -> Iterator[Replacement]:
        """Choose how codes are written."""
        writing = Writing.into(self.model, self.settings.storage)
        return (replacement.written(writing) for replacement in made)

    def _replacements(self, plan: Plan) -> Iterator[Replacement]:
        """Approximate the weights of the chosen layers over the pool; yield them one by one."""
        chosen = [self.analysis.resolve(d) for d in plan.decisions if d.scheme is not None]
        made = replacements_of(self.model, chosen, self.context)
        yield from tracked(made, len(chosen), partial(self.notify, "factorise"))
