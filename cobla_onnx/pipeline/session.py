"""A session: one analysis of a model, open for any number of budgets.

Analysing a model (second moments, singular values, sensitivities) takes most of the time and
does not depend on the budget. It is done once, by `open_session.open_study`. Each call of
`Study.solve` then finds ranks and factors for a budget, and `Study.finish` rewrites, verifies
and reports.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import onnx

from cobla_onnx.allocation import Allocation, Budget, Constraint, WeightError, allocate
from cobla_onnx.allocation.budget import least_fraction
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.external import is_external
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.order import Order, restore_order
from cobla_onnx.options import Settings
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.budget_errors import elsewhere_note, explain
from cobla_onnx.pipeline.build_report import make_report
from cobla_onnx.pipeline.calibrated import Calibrated
from cobla_onnx.pipeline.result import Result
from cobla_onnx.pipeline.timed import Timed
from cobla_onnx.pipeline.verification import verify
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import CalibrationReport, LatencyReport
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.progress import Progress, tracked
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankRule
from cobla_onnx.variants.offload import Spill
from cobla_onnx.variants.replacement import Replacement
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.work import replacements_of
from cobla_onnx.wording import option_name

__all__ = ["Solution", "Study"]


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
    """

    budget: Budget | None
    plan: Plan
    allocation: Allocation | None
    replacements: list[Replacement]
    spill: Spill
    calibration: CalibrationReport | None
    history: tuple[Step, ...]
    seconds: float


@dataclass
class Study:
    """An analysed model, made by `open_session.open_study`.

    Attributes
    ----------
    model : ModelProto
    source : Path or None
        The model's file.
    analysis : Analysis
    calibrated : Calibrated or None
        None without data.
    settings : Settings
    threads : int
    pool : Pool
        Runs the factorisation of layers.
    cache : Cache or None
    seconds : float
        Time that the analysis took.
    notify : callable
        Called with progress.
    rule : RankRule
        Decides the candidate ranks.
    timed : Timed or None
        Times of the model, if asked for.
    order : Order
        Original places of the nodes, if they are not sorted in the file.
    """

    model: onnx.ModelProto
    source: Path | None
    analysis: Analysis
    calibrated: Calibrated | None
    settings: Settings
    threads: int
    pool: Pool
    cache: Cache | None = None
    seconds: float = 0.0
    notify: Progress = field(default=lambda stage, done, total: None, repr=False)
    rule: RankRule = EVERY_RANK
    timed: Timed | None = None
    order: Order = field(default_factory=dict, repr=False)

    def compress(self, budget: Budget | None, plan: Plan | None = None) -> Result:
        """Find ranks and factors for a budget, verify the result and report.

        Raises
        ------
        BudgetError, VerificationError, UsageError
        """
        return self.finish(self.solve(budget, plan))

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
        if self.calibrated is not None:
            self.calibrated.start_over()
        if self.timed is not None:
            self.timed.start_over()
        allocation = None
        if plan is None:
            assert budget is not None
            try:
                allocation = self._allocate(budget)
            except BudgetError as error:
                raise explain(error, self.model, self.analysis, self.settings, self.rule) from error
            plan = self.analysis.plan(allocation.choices, allocation.factors)
        spill = Spill()
        replacements = spill.replacements(
            self._factorise(plan) if self.calibrated is None else self.calibrated.factorise(plan)
        )
        return Solution(
            budget,
            plan,
            allocation,
            replacements,
            spill,
            None if self.calibrated is None else self.calibrated.report(),
            () if self.calibrated is None else tuple(self.calibrated.history),
            time.perf_counter() - started,
        )

    def _factorise(self, plan: Plan) -> Iterator[Replacement]:
        """Factorise the weights of the chosen layers over the pool; yield them one by one."""
        chosen = [self.analysis.resolve(d) for d in plan.decisions if d.scheme is not None]
        context = RunContext(pool=self.pool, cache=self.cache)
        made = replacements_of(self.model, chosen, context)
        yield from tracked(made, len(chosen), partial(self.notify, "factorise"))

    @property
    def objective(self) -> Literal["weights", "output", "loss"]:
        """The objective that is minimised, with ``auto`` resolved."""
        return self.settings.needed

    def least_memory(self) -> float:
        """Least feasible fraction of memory, rounded up so that it is itself feasible."""
        (constraint,) = self.analysis.constraints(Budget(mem=1.0))
        return least_fraction(constraint, self.analysis.curves)

    def _allocate(self, budget: Budget) -> Allocation:
        if budget.latency is not None and self.timed is not None:
            return self.timed.choose(self.analysis, budget, self._choose)
        return self._choose(self.analysis.constraints(budget))

    def _choose(self, constraints: Sequence[Constraint]) -> Allocation:
        settings = self.settings
        needed = self.objective
        if needed == "weights" or self.calibrated is None:
            self.notify("allocate", 0, 1)
            curves = self.analysis.curves
            return allocate(curves, WeightError(curves), constraints, solver=settings.solver)
        return self.calibrated.choose(constraints, settings.solver, needed, settings.time_limit)

    def finish(self, solution: Solution) -> Result:
        """Rewrite the model, count its costs again, verify it and report.

        Raises
        ------
        BudgetError
            If a given plan is over the budget.
        VerificationError
        """
        started = time.perf_counter()
        replacements = solution.replacements
        self.notify("rewrite", 0, 1)
        compressed = rewrite(self.model, replacements) if replacements else self.model
        _check_budget(self.analysis, solution.budget, solution.plan, compressed)
        self.notify("rewrite", 1, 1)
        verification = None
        if replacements:
            steps = 1 if self.calibrated is None else self.calibrated.held_back_batches
            self.notify("verify", 0, steps)
            verification = verify(
                self.model,
                compressed,
                replacements,
                self.analysis.input_shapes,
                data=None if self.calibrated is None else self.calibrated.held_back(),
                measures=None if self.calibrated is None else self.calibrated.judge.measures,
                taps=None if self.calibrated is None else self.calibrated.taps,
                seed=self.settings.seed,
                threads=self.threads,
                progress=lambda done: self.notify("verify", min(done, steps - 1), steps),
            )
            if self.calibrated is not None:
                dataset = self.calibrated.dataset
                samples = dataset.count(dataset.selection)
                verification = replace(verification, samples=samples)
            self.notify("verify", steps, steps)
        latency: LatencyReport | None = None
        more_notes = () if self.calibrated is None else self.calibrated.notes
        if self.timed is not None:
            limit = None if solution.budget is None else solution.budget.latency
            latency, of_time = self.timed.report(compressed, solution.plan, limit)
            more_notes += of_time
        more_notes += elsewhere_note(self.model, self.analysis, solution.budget)
        analysis = self.analysis
        if self.calibrated is not None and solution.plan.factors == "weights":
            # The reported errors are those of the weights, which the factors approximate.
            analysis = analysis.with_curves(self.calibrated.rivals.weight_curves)
        if self.cache is not None:
            notes = dict.fromkeys((*analysis.notes, *self.cache.notes))
            analysis = replace(analysis, notes=tuple(notes))
        report = make_report(
            analysis,
            solution.budget,
            solution.plan,
            solution.allocation,
            verification,
            solution.calibration,
            source=self.source,
            mem_after=stored_bytes(compressed),
            seconds=self.seconds + solution.seconds + time.perf_counter() - started,
            seed=self.settings.seed,
            threads=self.threads,
            latency=latency,
            more_notes=more_notes,
            command=self.settings.call,
            history=solution.history,
        )
        # All checks are done: put the nodes back in the order of the file.
        if self.order and compressed is self.model:
            compressed = onnx.ModelProto()
            compressed.CopyFrom(self.model)
        restore_order(compressed.graph, self.order)
        external = any(map(is_external, self.model.graph.initializer))
        return Result(
            compressed,
            solution.plan,
            report,
            self.source,
            solution.spill,
            external,
            solution.history,
        )


def _check_budget(
    analysis: Analysis, budget: Budget | None, plan: Plan, compressed: onnx.ModelProto
) -> None:
    """Count the costs of the result again: budgets are hard. Times are measured elsewhere."""
    if budget is None or (budget.mem is None and budget.mac is None):
        return
    reached = {"mem": stored_bytes(compressed), "mac": analysis.macs_after(plan)}
    for name, limit in analysis.limits(replace(budget, latency=None)).items():
        cost = reached[name]
        if cost is None or cost > limit:
            raise BudgetError(
                f"{option_name(name)}: the plan costs {cost}, the budget allows {limit}; "
                "lower its ranks or raise the budget"
            )
