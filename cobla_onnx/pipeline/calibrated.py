"""Choose ranks and factors by the model's loss on calibration data.

The calibration split gives the second moments, from which the factors follow, and the
sensitivity of each layer. The selection split, which no factor sees, decides between candidate
plans and between a layer's factors before and after refit. All these decisions follow one loss;
for class distributions that is their divergence at a temperature (see `soften`), unless the
divergence itself is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.allocation import Allocation, Choice, Constraint, OutputError, allocate
from cobla_onnx.allocation.objective import masks_of
from cobla_onnx.allocation.slsqp import Effort
from cobla_onnx.allocation.sqp import Scores, Step, allocate_by_loss
from cobla_onnx.calibration.batching import TapLimit
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.evaluation.choosing import Compared
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.calibration.evaluation.gradients import GradientProbe
from cobla_onnx.calibration.evaluation.measured_model import MeasuredModel
from cobla_onnx.calibration.evaluation.output_choice import LossName
from cobla_onnx.calibration.evaluation.probe import Weights
from cobla_onnx.calibration.evaluation.quality import measure_quality
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.layers import read_bias, read_weight
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.neighbours import neighbours
from cobla_onnx.pipeline.search.network_loss import NetworkLoss, Path
from cobla_onnx.pipeline.search.refit import replaced_weights
from cobla_onnx.pipeline.search.rivals import Rivals
from cobla_onnx.pipeline.search.sensitivity import (
    PROBE_SAMPLES,
    Sensitivity,
    enough_samples,
    spread_over,
)
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import CalibrationReport
from cobla_onnx.runtime.cache import Arrays, Cache, digest, fetch
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.progress import Progress
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.temporary import Shelf
from cobla_onnx.variants.base import Approximation
from cobla_onnx.variants.from_data import FromData
from cobla_onnx.variants.registry import require_family
from cobla_onnx.variants.replacement import Replacement

__all__ = ["Calibrated"]

# Most allocations in a row, each after measuring the points that the last one chose.
ROUNDS = 4
# Limits of SLSQP on the network's loss: each iteration is a forward and a backward pass.
LOSS_EFFORT = Effort(max_variables=120, rounds=1, iterations=15, tolerance=1e-3, converge=False)


@dataclass
class Calibrated:
    """A model's analysis beside its calibration data.

    Parameters
    ----------
    model : ModelProto
    analysis : Analysis
        With what the layers have seen.
    dataset : Dataset
    batch : int
        Samples that are run at a time.
    loss : {'auto', 'kl', 'mse', 'ce'}
    threads : int
    progress : callable
    labels : int64 array, shape (samples, rows of a sample), optional
        Of all samples of the dataset; with them `loss` is ``ce``.
    refit : bool
        Whether factors are refitted after the allocation.
    pool : Pool
        Over which layers are measured.
    cache : Cache, optional
        Keeps what was measured.
    measured : MeasuredModel, optional
        Where the loss is taken; at all outputs of the model.
    compared : Compared, optional
        How outputs are compared; by `loss` where it is not given.
    taps : TapLimit, optional
        For the tensors that are read from a run.

    Attributes
    ----------
    judge : Judge
        Probes of the loss.
    finisher : Finisher
        Makes a plan's factors.
    rivals : Rivals
        Compares answers.
    history : list of Step
        Steps of the search by the network's loss.
    sensitivity : Sensitivity or None
        Measured losses of single layers that the last allocation was based on.
    """

    model: onnx.ModelProto
    analysis: Analysis
    dataset: Dataset
    batch: int
    loss: LossName
    threads: int
    progress: Progress
    labels: NDArray[np.int64] | None = None
    refit: bool = True
    pool: Pool = field(default_factory=Pool)
    cache: Cache | None = None
    measured: MeasuredModel | None = None
    compared: Compared | None = None
    taps: TapLimit | None = None
    history: list[Step] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    _report: dict[str, Any] = field(default_factory=dict)
    _first: dict[frozenset[str], Sensitivity] = field(default_factory=dict)
    _gradient_probe: GradientProbe | None = None

    def __post_init__(self) -> None:
        if self.measured is None:
            self.measured = MeasuredModel(self.model, {})
        self.judge = Judge(
            self.measured.model,
            self.analysis.layers,
            self.dataset,
            self.batch,
            self.loss,
            self.threads,
            self.labels,
            self.compared,
        )
        self.finisher = Finisher(
            self.model,
            self.analysis,
            self.judge,
            self.dataset,
            min(self.threads, self.pool.runs_at_most),
            self.progress,
            self.pool,
            self.cache,
        )
        self.rivals = Rivals(self.finisher)

    def start_over(self) -> None:
        """Forget the choices for the last budget; measurements are kept."""
        self._report = {}
        self.history = []
        self.sensitivity = None
        self.finisher.forget()

    def choose(
        self,
        constraints: Sequence[Constraint],
        solver: Literal["slsqp", "milp"],
        objective: Literal["auto", "output", "loss"],
        seconds: float | None = None,
    ) -> Allocation:
        """Choose ranks.

        Parameters
        ----------
        objective : {'auto', 'output', 'loss'}
            ``output`` is `allocate` alone, ``loss`` continues with `improve`; ``auto`` does so
            if the gradient with respect to every layer is available.
        seconds : float, optional
            Time that `improve` may take.

        Raises
        ------
        BudgetError
            If the constraints cannot be met.
        ModelError
            If ``loss`` is asked for and no layer has a gradient.
        """
        warm = self.allocate(constraints, solver)
        if not any(warm.choices):
            return warm
        answer = self._improved(warm, constraints, objective, seconds)
        answer, rival = self.rivals.or_weights_alone(answer, constraints, self.refit)
        self._report["rivals"] = (*self._report.get("rivals", ()), rival)
        return answer

    def _improved(
        self,
        warm: Allocation,
        constraints: Sequence[Constraint],
        objective: Literal["auto", "output", "loss"],
        seconds: float | None,
    ) -> Allocation:
        """Improve by the loss of the whole network, where that is wanted and available."""
        if objective == "output":
            return warm
        try:
            blocked = self.gradients().blocked
        except ModelError as error:
            if objective == "loss":
                raise
            return warm.noting(
                f"objective output: the model has no gradient graph, {error.in_flags()}"
            )
        if blocked:
            index, reason = min(blocked.items())
            name = self.analysis.layers[index].name
            if objective == "auto":
                return warm.noting(
                    f"objective output: there is no gradient by layer {name!r}, {reason}"
                )
            warm = warm.noting(
                f"{len(blocked)} layers have no gradient and stay as the objective output has "
                f"them; {name!r}: {reason}"
            )
        if self.gradients().left_out:
            warm = warm.noting(
                f"the gradient does not see {self.gradients().left_out} batches, whose shapes are "
                "more than it is made for; give samples of fewer shapes to have all of them count"
            )
        return self.improve(warm, constraints, replace(LOSS_EFFORT, seconds=seconds))

    def improve(
        self,
        warm: Allocation,
        constraints: Sequence[Constraint],
        effort: Effort = LOSS_EFFORT,
    ) -> Allocation:
        """Improve the choices of `allocate` by the loss of the whole network.

        Returns the best candidate on the selection split, or `warm` if none is better there
        beyond the noise; see `allocate_by_loss`.
        """
        if self.sensitivity is None or not any(warm.choices):
            # Nothing had to be cut.
            return warm
        curves = self.analysis.curves
        gradients = self.gradients()
        fixed = frozenset(gradients.blocked)
        objective = NetworkLoss(
            curves, self._path(), gradients, self.sensitivity.objective(), fixed=fixed
        )
        start = masks_of(curves, warm.choices)
        # The separable model ignores interactions between the errors of layers.
        ratio = objective.value(start) / max(objective.separable.value(start), 1e-12)
        objective = replace(objective, separable=objective.separable.scaled(ratio))
        allocation, candidates = allocate_by_loss(
            curves,
            objective,
            constraints,
            warm,
            self.scores,
            effort,
            self._watch,
            self.refitted_scores if self.refit else None,
        )
        self._report["candidates"] += tuple(float(c.scores.searched.mean()) for c in candidates[1:])
        return allocation

    def allocate(
        self, constraints: Sequence[Constraint], solver: Literal["slsqp", "milp"]
    ) -> Allocation:
        """Choose ranks by measured loss: the last round's, unless a rival is significantly better.

        See `Rivals.settle`.

        Raises
        ------
        BudgetError
            If the constraints cannot be met.
        """
        curves = self.analysis.curves
        whole: tuple[Choice | None, ...] = (None,) * len(curves)
        if all(c.cost(curves, whole) <= c.limit for c in constraints):
            errors = [[curve.errors for curve in layer.curves] for layer in curves]
            return allocate(curves, OutputError(errors), constraints, solver=solver)
        sensitivity = self._measured(constraints)
        rounds: list[tuple[OutputError, Allocation]] = []
        for number in range(ROUNDS):
            self.progress("allocate", number, ROUNDS)
            losses = sensitivity.objective()
            rounds.append((losses, allocate(curves, losses, constraints, solver=solver)))
            if number == ROUNDS - 1 or not sensitivity.refine(rounds[-1][1].choices):
                break
        self.progress("allocate", ROUNDS, ROUNDS)
        *earlier, (losses, last) = rounds
        others = [(f"round {number + 1}", each) for number, (_, each) in enumerate(earlier)]
        near = neighbours(self.analysis, losses, constraints, last)
        settled = self.rivals.settle(last, [*others, *near])
        self._report |= {"rivals": settled.rivals, "candidates": settled.losses}
        return settled.allocation

    def _measured(self, constraints: Sequence[Constraint]) -> Sensitivity:
        """Measure the layers, once for each kind of budget.

        Every allocation refines a copy, so that it does not depend on earlier ones.
        """
        kinds = frozenset(constraint.name for constraint in constraints)
        if kinds not in self._first:
            first = Sensitivity(
                self.analysis.layers,
                self.analysis.curves,
                self.analysis.schemes,
                self._seen,
                self.judge.spread_on(self._probe_samples, self.pool),
                self.cache,
                self._key(self._probe_samples),
            )
            first.measure(constraints, partial(self.progress, "sensitivity"))
            self._first[kinds] = first
        self.sensitivity = self._first[kinds].copy()
        self._report["probe_samples"] = self.sensitivity.samples
        return self.sensitivity

    def _key(self, samples: Sequence[int]) -> str:
        """Hash what losses on samples depend on, apart from the weights; empty without a cache."""
        return "" if self.cache is None else digest(self._seen.key, self.judge.key(samples))

    @cached_property
    def _probe_samples(self) -> Sequence[int]:
        """Samples on which layers are truncated one at a time.

        Losses of class distributions differ much from sample to sample. Those of images hardly
        do, and cost the most: a pilot run with all layers truncated a little shows how many
        samples are enough.
        """
        chosen = spread_over(self.dataset.calibration, PROBE_SAMPLES)
        if any(measure.kind != "mse" for measure in self.judge.measures.values()):
            return chosen

        def pilot() -> Arrays:
            layers = self.analysis.curves
            largest = [Choice(0, int(layer.curves[0].levels[-1])) for layer in layers]
            return {"losses": self.judge.on(chosen).losses(self._truncated(largest))}

        key = digest(self._key(chosen), "pilot")
        return spread_over(chosen, enough_samples(fetch(self.cache, "loss", key, pilot)["losses"]))

    def gradients(self) -> GradientProbe:
        """Open the gradient graph once, on the whole calibration split."""
        if self._gradient_probe is None:
            probe = self.judge.on(self.dataset.calibration)
            self._gradient_probe = GradientProbe(probe, self.threads)
        return self._gradient_probe

    def _path(self) -> Path:
        def approximate(layer: int, curve: int, ranks: Sequence[int]) -> Sequence[Approximation]:
            found = self.analysis.layers[layer], self.analysis.schemes[layer][curve]
            return self._seen.approximate(*found, ranks)

        whole = [
            (read_weight(self.model, layer), read_bias(self.model, layer))
            for layer in self.analysis.layers
        ]
        return Path(whole, approximate)

    def _watch(self, step: Step) -> None:
        self.history.append(step)
        self.progress(f"network loss: {step.loss:.4g}", step.number, step.number + 1)

    def factorise(self, plan: Plan) -> list[Replacement]:
        """Factorise the chosen layers, and refit them if asked for."""
        chosen = self.finisher.chosen(plan)
        approximations: Sequence[Approximation] = [entry.approximation for entry in chosen]
        before: float | None = None
        if self.refit and plan.factors == "data":
            before = self.judge.selection.loss(replaced_weights(chosen, approximations))
            approximations, self._report["refitted"] = self.finisher.refitted(plan)
            self.finisher.forget()
        selection = self.judge.selection
        found = Shelf(
            {name: actual[name] for name in expected if name in actual}
            for expected, actual in selection.outputs(replaced_weights(chosen, approximations))
        )
        loss = float(selection.losses_of(zip(selection.expected, found, strict=True)).mean())
        self._report["loss"] = loss
        self._report["loss_before_refit"] = loss if before is None else before
        assert self.measured is not None
        quality = measure_quality(selection, zip(selection.expected, found, strict=True))
        # Users know the outputs, not the tensors that are measured in their place.
        output = self.measured.outputs.get(quality.output, quality.output)
        self._report["quality"] = replace(quality, output=output)
        return [
            require_family(entry.scheme.name).replace(entry.layer, entry.scheme, found)
            for entry, found in zip(chosen, approximations, strict=True)
        ]

    def held_back(self) -> tuple[str, Callable[[], Iterable[Feeds]]]:
        """Return the selection split's name, and fresh batches of it, for the verification."""
        return "held-back", lambda: self.judge.batches(self.dataset.selection)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on which tensors are measured in place of which outputs."""
        return () if self.measured is None else self.measured.notes

    @property
    def held_back_batches(self) -> int:
        """About how many batches `held_back` gives; more where shapes differ."""
        return max(1, -(-len(self.dataset.selection) // self.batch))

    def report(self) -> CalibrationReport:
        """Report the data that was used, and its results."""
        assert self.measured is not None
        shown = self.measured.shown
        selection = self.judge.selection
        # Records that are kept whole are batches.
        whole = self.dataset.rows is None
        return CalibrationReport(
            source=self.dataset.source,
            calibration_samples=self.dataset.count(self.dataset.calibration),
            selection_samples=len(selection.batches) if whole else selection.samples,
            outputs={shown(name): m.kind for name, m in self.judge.measures.items()},
            temperatures={shown(name): t for name, t in self.judge.temperatures.items()},
            **self._report,
        )

    @property
    def _seen(self) -> FromData:
        assert self.analysis.seen is not None
        return self.analysis.seen

    def _truncated(self, choices: Sequence[Choice | None]) -> Weights:
        """Weights and biases of the chosen layers before refit."""
        return self.finisher.weights(self.analysis.plan(choices))

    def scores(self, choices: Sequence[Choice | None]) -> Scores:
        """Losses of a plan on the selection split, before refit."""
        return Scores(*self.judge.scores(self._truncated(choices)))

    def refitted_scores(self, choices: Sequence[Choice | None]) -> Scores:
        """Losses of a plan on the selection split, after refit."""
        weights = self.finisher.refitted_weights(self.analysis.plan(choices))
        return Scores(*self.judge.scores(weights))
