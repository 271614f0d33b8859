"""Decide ranks and factors by what a model does on calibration data.

The calibration split gives second moments, from which the factors follow, and the scale
between layers. The selection split, which no factor sees, chooses between candidate plans
and between a layer's factors before and after refit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import onnx

from cobla_onnx.allocation import Allocation, Choice, Constraint, OutputError, allocate
from cobla_onnx.analysis import Analysis
from cobla_onnx.calibration.dataset import Dataset
from cobla_onnx.calibration.loss import LossName
from cobla_onnx.calibration.probe import Probe
from cobla_onnx.calibration.refit import ChosenLayer, refit_layers
from cobla_onnx.calibration.seen import Approximation
from cobla_onnx.calibration.sensitivity import Sensitivity
from cobla_onnx.plan import Plan
from cobla_onnx.progress import Progress
from cobla_onnx.report import CalibrationReport
from cobla_onnx.rewrite import Replacement, make_replacement
from cobla_onnx.runtime import Feeds

__all__ = ["Calibrated"]

# Samples on which layers are truncated one at a time.
PROBE_SAMPLES = 48
# Allocations at most, each with the points measured that the one before has chosen.
ROUNDS = 4


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
    """

    model: onnx.ModelProto
    analysis: Analysis
    dataset: Dataset
    batch: int
    loss: LossName
    threads: int
    progress: Progress
    _report: dict[str, Any] = field(default_factory=dict)
    _sensitivity: Sensitivity | None = None

    def __post_init__(self) -> None:
        self._selection = self._probe(self.batches(self.dataset.selection))

    def batches(self, indices: Sequence[int]) -> Iterable[Feeds]:
        """Return a fresh iterator over samples."""
        return self.dataset.batches(indices, self.batch)

    def _probe(self, batches: Iterable[Feeds]) -> Probe:
        return Probe(self.model, self.analysis.layers, batches, self.loss, self.threads)

    def allocate(
        self, constraints: Sequence[Constraint], solver: Literal["slsqp", "milp"]
    ) -> Allocation:
        """Choose ranks by measured loss; of several allocations the best on the selection.

        Raises
        ------
        BudgetError
            If the constraints cannot be met.
        """
        curves = self.analysis.curves
        whole: tuple[Choice | None, ...] = (None,) * len(curves)
        if all(c.cost(curves, whole) <= c.limit for c in constraints):
            errors = [[curve.relative_errors() for curve in layer.curves] for layer in curves]
            return allocate(curves, OutputError(errors), constraints, solver=solver)
        sensitivity = self._measured(constraints)
        found: list[tuple[float, Allocation]] = []
        for number in range(ROUNDS):
            self.progress("allocate", number, ROUNDS)
            allocation = allocate(curves, sensitivity.objective(), constraints, solver=solver)
            found.append((self._selection_loss(allocation.choices), allocation))
            if number == ROUNDS - 1 or not sensitivity.refine(allocation.choices):
                break
        self.progress("allocate", ROUNDS, ROUNDS)
        self._report["candidates"] = tuple(loss for loss, _ in found)
        return min(found, key=lambda entry: entry[0])[1]

    def _measured(self, constraints: Sequence[Constraint]) -> Sensitivity:
        """Measure the layers once; a second budget starts from what is known."""
        if self._sensitivity is None:
            indices = self.dataset.calibration
            step = max(1, len(indices) // PROBE_SAMPLES)
            probe = self._probe(self.batches(indices[::step][:PROBE_SAMPLES]))
            self._report["probe_samples"] = probe.samples
            self._sensitivity = Sensitivity(
                self.analysis.layers,
                self.analysis.curves,
                self.analysis.schemes,
                self._seen,
                probe,
            )
            self._sensitivity.measure(constraints, partial(self.progress, "sensitivity"))
        return self._sensitivity

    def factorise(self, plan: Plan, refit: bool) -> list[Replacement]:
        """Factorise the chosen layers, and refit them if asked to."""
        chosen = self._chosen(plan)
        approximations = [entry.approximation for entry in chosen]
        self._report["loss_before_refit"] = self._loss(chosen, approximations)
        if refit:
            approximations, kept = refit_layers(
                self.model,
                chosen,
                lambda: self.batches(self.dataset.calibration),
                self._selection,
                threads=self.threads,
                progress=partial(self.progress, "refit"),
            )
            self._report["refitted"] = kept
        self._report["loss"] = self._loss(chosen, approximations)
        return [
            make_replacement(entry.layer, entry.scheme, found.factors, found.bias)
            for entry, found in zip(chosen, approximations, strict=True)
        ]

    def held_back(self) -> tuple[str, Callable[[], Iterable[Feeds]]]:
        """Return the selection split's name, and fresh batches of it, for the verification."""
        return "held-back", lambda: self.batches(self.dataset.selection)

    def report(self) -> CalibrationReport:
        """Return what the data was and what it told."""
        return CalibrationReport(
            source=self.dataset.source,
            calibration_samples=len(self.dataset.calibration),
            selection_samples=self._selection.samples,
            outputs=dict(self._selection.kinds),
            **self._report,
        )

    @property
    def _seen(self) -> Any:
        assert self.analysis.seen is not None
        return self.analysis.seen

    def _chosen(self, plan: Plan) -> list[ChosenLayer]:
        index = {layer.name: i for i, layer in enumerate(self.analysis.layers)}
        chosen = []
        for decision in plan.decisions:
            if decision.scheme is None:
                continue
            layer, scheme, rank = self.analysis.resolve(decision)
            (found,) = self._seen.approximate(layer, scheme, [rank])
            chosen.append(ChosenLayer(index[layer.name], layer, scheme, rank, found))
        return chosen

    def _selection_loss(self, choices: Sequence[Choice | None]) -> float:
        chosen = self._chosen(self.analysis.plan(choices))
        return self._loss(chosen, [entry.approximation for entry in chosen])

    def _loss(
        self, chosen: Sequence[ChosenLayer], approximations: Sequence[Approximation]
    ) -> float:
        return self._selection.loss(
            {
                entry.index: (found.weight, found.bias)
                for entry, found in zip(chosen, approximations, strict=True)
            }
        )
