"""Allocate ranks by the network's loss: sequential quadratic programming with integers.

Starting from choices within the budgets, the loss is modelled to second order, with its true
gradient at the current masks and the curvature of the separable model. Two problems are solved
with this model, repeatedly:

* with relaxed masks, by SLSQP (Li and Shi 2018), which refines the curvature as it goes; its
  answer is rounded by the second problem;
* with integer choices, as a multiple-choice knapsack, solved exactly.

A calibration set of a few hundred samples is easily overfitted: choices made for it may be no
better on other samples. So every candidate is scored on samples that neither its factors nor
its gradients have seen. The best few are then finished as the answer will be (their factors
are refitted). A candidate replaces the start only if, on those samples, the loss that the
search follows is lower by more than half a standard error of the paired difference, and the
final loss is not higher by more than one standard error (after Breiman et al. 1984,
Classification and Regression Trees, section 3.4.3).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from cobla_onnx.allocation.budget import Constraint
from cobla_onnx.allocation.knapsack import knapsack
from cobla_onnx.allocation.objective import Masks, Objective, loss_curves, masks_of
from cobla_onnx.allocation.paired import paired_gain
from cobla_onnx.allocation.problem import Choice, Float64, LayerCurves, LossCurves
from cobla_onnx.allocation.slsqp import Effort, Iteration, Relaxed, relax
from cobla_onnx.allocation.solve import Allocation, fitting

__all__ = ["Candidate", "ModelledLoss", "Scores", "Step", "allocate_by_loss"]

# Factors on the curvature of the separable model; larger ones make shorter steps.
DAMPINGS = (1.0, 2.0, 4.0)
# Most knapsacks in a row from one start.
STEPS = 3
# The model is too inexact to be worth an optimum with more digits.
RELATIVE_GAP = 1e-2
# Number of candidates that are finished (refitted).
SHORTLIST = 2
# Standard errors by which a candidate must be better than the start in the loss that the search
# follows, and by which it may look worse in the final loss, which is noisier.
SIGNIFICANCE, TOLERANCE = 0.5, 1.0

Choices = tuple[Choice | None, ...]


class ModelledLoss(Objective, Protocol):
    """A loss with a second-order model of it; layers in `fixed` have no gradient."""

    fixed: frozenset[int]

    def model(self, masks: Masks, damping: float) -> LossCurves:
        """Predict the loss at every level of every curve, with the other layers' masks held fixed.

        Relative to the layer kept whole; `damping` multiplies the curvature.
        """
        ...


@dataclass(frozen=True)
class Step:
    """One evaluation of the search, for its history.

    Attributes
    ----------
    stage : str
    number : int
        From 0, in chronological order.
    loss : float
        Loss that the search follows, on the calibration split.
    selection : float or None
        Final loss, on the selection split, where the masks are 0 or 1.
    costs : dict of str to float
        Fraction of the original's memory or MACs that is used, by budget.
    seconds : float
        Since the start.
    """

    stage: str
    number: int
    loss: float
    selection: float | None
    costs: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Scores:
    """Losses of the samples of the selection split, each float64 of shape (samples,).

    Attributes
    ----------
    searched : array
        By the loss that the search follows.
    final : array
        By the final loss.
    """

    searched: Float64
    final: Float64


@dataclass(frozen=True)
class Candidate:
    """Choices within the budgets, and their losses on both splits.

    Attributes
    ----------
    origin : str
    choices : tuple of (Choice or None)
    loss : float
        Loss that the search follows, on the calibration split.
    scores : Scores
        On the selection split.
    """

    origin: str
    choices: Choices
    loss: float
    scores: Scores

    def beats(self, start: Candidate) -> bool:
        """Whether it is better than the start on the selection split, beyond the noise."""
        searched = paired_gain(start.scores.searched, self.scores.searched)
        final = paired_gain(start.scores.final, self.scores.final)
        return searched.in_errors > SIGNIFICANCE and final.in_errors > -TOLERANCE


def allocate_by_loss(
    layers: Sequence[LayerCurves],
    objective: ModelledLoss,
    constraints: Sequence[Constraint],
    warm: Allocation,
    score: Callable[[Sequence[Choice | None]], Scores],
    effort: Effort,
    watch: Callable[[Step], None] = lambda step: None,
    finish: Callable[[Sequence[Choice | None]], Scores] | None = None,
) -> tuple[Allocation, tuple[Candidate, ...]]:
    """Improve choices by the loss of the network.

    Parameters
    ----------
    layers : sequence of LayerCurves
    objective : ModelledLoss
    constraints : sequence of Constraint
    warm : Allocation
        Within the constraints; returned if nothing is better beyond the noise.
    score : callable
        Returns the losses on the selection split under given choices.
    effort : Effort
        Limits of SLSQP; the time limit applies to the whole search. An interrupt ends the
        search, too, and the best candidate so far is returned.
    watch : callable
        Called with every step.
    finish : callable, optional
        As `score`, but with the factors finished (refitted).

    Returns
    -------
    allocation : Allocation
    candidates : tuple of Candidate
        All candidates that were scored, the start first.
    """
    search = _Search(layers, objective, constraints, score, effort, watch)
    search.add("output's knapsack", warm.choices)
    relaxed: Relaxed | None = None
    stopped = ""
    try:
        for damping in DAMPINGS:
            search.descend(f"knapsack, damping {damping:g}", warm.choices, damping)
        relaxed = search.relax(search.best_by_loss().choices, warm)
        search.round(relaxed)
    except KeyboardInterrupt:
        stopped = "it was interrupted"
    except _TimeIsUp:
        stopped = "the time limit was reached"
    stopped = stopped or (relaxed.stopped if relaxed is not None else "")
    best = _elected(search.candidates, finish)
    notes = tuple(n for n in warm.certificate.notes if not n.startswith("SLSQP"))
    if relaxed is not None and relaxed.masks is None:
        notes += (f"SLSQP on the network's loss: {relaxed.problem}; knapsacks alone were used",)
    if stopped and stopped != "the iteration limit was reached":
        notes += (f"the search by the network's loss ended early: {stopped}",)
    solved = relaxed is not None and relaxed.masks is not None
    certificate = replace(
        warm.certificate,
        objective=objective.name,
        value=best.loss,
        lower_bound=None,
        gap=None,
        reached={c.name: c.cost(layers, best.choices) for c in constraints},
        multipliers=relaxed.multipliers if relaxed and solved else warm.certificate.multipliers,
        relaxed_value=relaxed.value if relaxed and solved else None,
        kkt_residual=relaxed.kkt_residual if relaxed and solved else None,
        iterations=relaxed.iterations if relaxed else 0,
        variables=relaxed.variables if relaxed else 0,
        notes=notes,
        fronts={},
    )
    return Allocation(best.choices, certificate), tuple(search.candidates)


def _elected(
    candidates: Sequence[Candidate],
    finish: Callable[[Sequence[Choice | None]], Scores] | None,
) -> Candidate:
    """The best candidate that beats the start (the first); a shortlist is finished before."""

    def searched(candidate: Candidate) -> float:
        return float(candidate.scores.searched.mean())

    start, *others = candidates
    if finish is None or not others:
        return min((c for c in others if c.beats(start)), key=searched, default=start)
    finished = [
        replace(candidate, scores=finish(candidate.choices))
        for candidate in (start, *sorted(others, key=searched)[:SHORTLIST])
    ]
    return _elected(finished, None)


class _TimeIsUp(Exception):
    """Raised between two evaluations to end the search."""


@dataclass
class _Search:
    """The candidates so far, and the inputs for making more."""

    layers: Sequence[LayerCurves]
    objective: ModelledLoss
    constraints: Sequence[Constraint]
    score: Callable[[Sequence[Choice | None]], Scores]
    effort: Effort
    watch: Callable[[Step], None]
    candidates: list[Candidate] = field(default_factory=list)
    _began: float = field(default_factory=time.perf_counter)
    _steps: int = 0

    def add(self, origin: str, choices: Choices) -> Candidate:
        """Evaluate choices, unless they were evaluated before."""
        for known in self.candidates:
            if known.choices == choices:
                return known
        loss = self.objective.value(masks_of(self.layers, choices))
        found = Candidate(origin, choices, loss, self.score(choices))
        self.candidates.append(found)
        costs = {c.name: c.cost(self.layers, choices) / c.total for c in self.constraints}
        self._note(origin, loss, float(found.scores.final.mean()), costs)
        return found

    def best_by_loss(self) -> Candidate:
        """Return the candidate with the least loss on the calibration split."""
        return min(self.candidates, key=lambda c: c.loss)

    def descend(self, origin: str, start: Choices, damping: float) -> None:
        """Solve one knapsack after another as long as the loss falls."""
        current = self.add(origin, start)
        for _ in range(STEPS):
            self._check_time()
            model = self.objective.model(masks_of(self.layers, current.choices), damping)
            found = self.add(origin, self._knapsack(model))
            if found.loss >= current.loss:
                return
            current = found

    def relax(self, start: Choices, warm: Allocation) -> Relaxed:
        """Solve the relaxed problem by SLSQP."""
        losses = loss_curves(self.objective, self.layers)
        left = self.effort.seconds
        if left is not None:
            left = max(left - self._seconds(), 0.0)
        effort = replace(self.effort, seconds=left, watch=self._relaxed_step)
        return relax(
            self.layers,
            self.objective,
            losses,
            self.constraints,
            start,
            warm.certificate.multipliers,
            effort,
            self.objective.fixed,
        )

    def round(self, relaxed: Relaxed) -> None:
        """Round relaxed masks to choices: nearest ranks, and knapsacks on the model."""
        if relaxed.masks is None:
            return
        for choices in list(fitting(self.layers, self.constraints, relaxed))[-1:]:
            self.add("slsqp, nearest ranks", choices)
        for damping in DAMPINGS[:2]:
            self._check_time()
            choices = self._knapsack(self.objective.model(relaxed.masks, damping))
            self.descend("slsqp, rounded by knapsack", choices, damping)

    def _knapsack(self, model: LossCurves) -> Choices:
        return knapsack(self.layers, model, self.constraints, relative_gap=RELATIVE_GAP).choices

    def _relaxed_step(self, iteration: Iteration) -> None:
        costs = {
            c.name: (c.fixed + share * max(c.limit - c.fixed, 1)) / c.total
            for c, share in zip(self.constraints, iteration.costs, strict=True)
        }
        self._note("slsqp", iteration.value, None, costs)

    def _note(
        self, stage: str, loss: float, selection: float | None, costs: dict[str, float]
    ) -> None:
        self.watch(Step(stage, self._steps, loss, selection, costs, self._seconds()))
        self._steps += 1

    def _seconds(self) -> float:
        return time.perf_counter() - self._began

    def _check_time(self) -> None:
        if self.effort.seconds is not None and self._seconds() > self.effort.seconds:
            raise _TimeIsUp
