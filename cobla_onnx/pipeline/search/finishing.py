"""Compute the factors of a plan's layers, before and after refit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import onnx

from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.calibration.evaluation.probe import Weights
from cobla_onnx.calibration.statistics import Approximation
from cobla_onnx.graph.layers import Layer, read_weight
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.refit import ChosenLayer, refit_layers, replaced_weights
from cobla_onnx.plan import Decision, Plan
from cobla_onnx.runtime.cache import Cache
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.progress import Progress
from cobla_onnx.variants.low_rank.matricisation import Scheme
from cobla_onnx.variants.low_rank.units import FactorUnit, factorize_layer

__all__ = ["Approximate", "Finisher"]

Approximate: TypeAlias = Callable[[Layer, Scheme, Sequence[int]], list[Approximation]]
"""Returns approximations of a layer at the given ranks, such as `Seen.approximate`."""


@dataclass
class Finisher:
    """Makes the factors of a plan.

    Parameters
    ----------
    model : ModelProto
    analysis : Analysis
        With the statistics of the calibration data.
    judge : Judge
        Its selection split decides which layers keep their refit.
    dataset : Dataset
        Layers are refitted to its calibration split.
    threads : int
    progress : callable
    pool : Pool
        Runs the factorisation of weights where it does not depend on data.
    cache : Cache, optional
        Keeps the factors made without data.
    """

    model: onnx.ModelProto
    analysis: Analysis
    judge: Judge
    dataset: Dataset
    threads: int
    progress: Progress
    pool: Pool = field(default_factory=Pool)
    cache: Cache | None = None
    _refitted: dict[tuple[Decision, ...], tuple[list[Approximation], int]] = field(
        default_factory=dict
    )

    def forget(self) -> None:
        """Forget the plans that were refitted."""
        self._refitted.clear()

    def chosen(self, plan: Plan, approximate: Approximate | None = None) -> list[ChosenLayer]:
        """Return the layers that a plan factorises, with their factors before refit.

        The factors follow from the calibration data, unless the plan wants factors of the weights
        themselves. `approximate`, if given, replaces the calibration data.
        """
        seen = self.analysis.seen
        assert seen is not None
        resolved = [self.analysis.resolve(d) for d in plan.decisions if d.scheme is not None]
        if plan.factors == "weights":
            found = self._of_weights(resolved)
        else:
            one = approximate or seen.approximate
            found = [one(layer, scheme, [rank])[0] for layer, scheme, rank in resolved]
        index = {layer.name: i for i, layer in enumerate(self.analysis.layers)}
        return [
            ChosenLayer(
                index[layer.name], layer, scheme, rank, each, seen.importance.get(layer.name)
            )
            for (layer, scheme, rank), each in zip(resolved, found, strict=True)
        ]

    def _of_weights(self, resolved: Sequence[tuple[Layer, Scheme, int]]) -> list[Approximation]:
        units = (
            FactorUnit(*each, self.pool.carry(read_weight(self.model, each[0])), self.cache)
            for each in resolved
        )
        found = []
        for (_, scheme, _), made in zip(
            resolved, self.pool.map(factorize_layer, units), strict=True
        ):
            if self.cache is not None:
                self.cache.notes += made.notes
            dense = scheme.weight(made.factors.left @ made.factors.right)
            found.append(Approximation(made.factors, dense, None))
        return found

    def weights(self, plan: Plan, approximate: Approximate | None = None) -> Weights:
        """Weights and biases of the chosen layers before refit."""
        chosen = self.chosen(plan, approximate)
        return replaced_weights(chosen, [entry.approximation for entry in chosen])

    def refitted_weights(self, plan: Plan) -> Weights:
        """Weights and biases of the chosen layers after refit."""
        return replaced_weights(self.chosen(plan), self.refitted(plan)[0])

    def refitted(self, plan: Plan) -> tuple[list[Approximation], int]:
        """Refit a plan's layers, once for each plan; also return how many were changed."""
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
