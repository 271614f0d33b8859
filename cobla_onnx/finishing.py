"""From a plan to the factors of its layers, before and after refit."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import onnx

from cobla_onnx.analysis import Analysis
from cobla_onnx.calibration.dataset import Dataset
from cobla_onnx.calibration.judge import Judge
from cobla_onnx.calibration.probe import Weights
from cobla_onnx.calibration.refit import ChosenLayer, refit_layers, replaced_weights
from cobla_onnx.calibration.seen import Approximation
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.progress import Progress

__all__ = ["Finisher"]


@dataclass
class Finisher:
    """Makes the factors of a plan.

    Parameters
    ----------
    model : ModelProto
    analysis : Analysis
        With what the layers have seen.
    judge : Judge
        Its selection split decides which layers keep their refit.
    dataset : Dataset
        Its calibration split is what layers are refitted to.
    threads : int
    progress : callable
    """

    model: onnx.ModelProto
    analysis: Analysis
    judge: Judge
    dataset: Dataset
    threads: int
    progress: Progress
    _refitted: dict[tuple[Decision, ...], tuple[list[Approximation], int]] = field(
        default_factory=dict
    )

    def forget(self) -> None:
        """Forget the plans that were refitted."""
        self._refitted.clear()

    def chosen(self, plan: Plan) -> list[ChosenLayer]:
        """Return the layers that a plan factorises, with their factors before refit."""
        seen = self.analysis.seen
        assert seen is not None
        index = {layer.name: i for i, layer in enumerate(self.analysis.layers)}
        chosen = []
        for decision in plan.decisions:
            if decision.scheme is None:
                continue
            layer, scheme, rank = self.analysis.resolve(decision)
            (found,) = seen.approximate(layer, scheme, [rank])
            importance = seen.importance.get(layer.name)
            chosen.append(ChosenLayer(index[layer.name], layer, scheme, rank, found, importance))
        return chosen

    def weights(self, plan: Plan) -> Weights:
        """Weights and biases of the chosen layers before refit."""
        chosen = self.chosen(plan)
        return replaced_weights(chosen, [entry.approximation for entry in chosen])

    def refitted_weights(self, plan: Plan) -> Weights:
        """Weights and biases of the chosen layers after refit."""
        return replaced_weights(self.chosen(plan), self.refitted(plan)[0])

    def refitted(self, plan: Plan) -> tuple[list[Approximation], int]:
        """Refit a plan's layers, once for each plan; and tell how many were changed."""
        if plan.decisions not in self._refitted:
            self._refitted[plan.decisions] = refit_layers(
                self.model,
                self.chosen(plan),
                lambda: self.judge.batches(self.dataset.calibration),
                self.judge.followed,
                threads=self.threads,
                progress=partial(self.progress, "refit"),
            )
        return self._refitted[plan.decisions]
