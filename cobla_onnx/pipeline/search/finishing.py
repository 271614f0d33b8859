"""Compute the factors of a plan's layers, before and after refit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import onnx

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.calibration.evaluation.probe import Pair, Weights
from cobla_onnx.graph.layers import Layer
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.refit import ChosenLayer, refit_layers, replaced_weights
from cobla_onnx.plan import Plan
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.pool import open_pool
from cobla_onnx.variants.base import Approximate, Approximation, Form
from cobla_onnx.variants.work import approximations_of

__all__ = ["Finisher"]


@dataclass
class Finisher:
    """Makes the factors of plans for one budget, and keeps those that were judged or refitted.

    A plan's losses and factors do not depend on the plans before it. They are kept no longer
    than one budget needs, since they are as large as the weights.

    Parameters
    ----------
    model : ModelProto
    analysis : Analysis
        With the statistics of the calibration data.
    judge : Judge
        Layers are refitted to the calibration split of its dataset; the selection split decides
        which of them keep their refit.
    context : RunContext
        Its pool factorises weights where that does not depend on data, and its cache keeps them.
    """

    model: onnx.ModelProto
    analysis: Analysis
    judge: Judge
    context: RunContext = field(default_factory=RunContext)
    _refitted: dict[Plan, tuple[Sequence[Approximation], int]] = field(default_factory=dict)
    _held_back: dict[Plan, Float64] = field(default_factory=dict)

    def chosen(self, plan: Plan, approximate: Approximate | None = None) -> list[ChosenLayer]:
        """Return the layers that a plan replaces, with their factors before refit.

        The factors follow from the calibration data, unless the plan wants factors of the weights
        themselves. `approximate`, if given, replaces the calibration data.
        """
        return list(self._each(plan, approximate))

    def _each(self, plan: Plan, approximate: Approximate | None) -> Iterator[ChosenLayer]:
        from_data = self.analysis.from_data
        assert from_data is not None
        resolved = [self.analysis.resolve(d) for d in plan.decisions if d.scheme is not None]
        if plan.factors == "weights":
            found = approximations_of(self.model, resolved, self.context)
        else:
            found = self._made(approximate or from_data.approximate, resolved)
        index = {layer.name: i for i, layer in enumerate(self.analysis.layers)}
        for (layer, form, level), each in zip(resolved, found, strict=True):
            importance = from_data.importance.get(layer.name)
            yield ChosenLayer(index[layer.name], layer, form, level, each, importance)

    def _made(
        self, approximate: Approximate, resolved: Sequence[tuple[Layer, Form, int]]
    ) -> Iterator[Approximation]:
        """Approximate layers, several at a time; the statistics are of this process."""

        def one(wanted: tuple[Layer, Form, int]) -> Approximation:
            layer, form, level = wanted
            return approximate(layer, form, [level])[0]

        with open_pool(self.context.threads) as pool:
            yield from pool.map(one, resolved, self.context.threads)

    def weights(self, plan: Plan, approximate: Approximate | None = None) -> Weights:
        """Weights and biases of the chosen layers before refit, in the types of the layers.

        Made one by one: the factors of all layers, in double precision, are several times the
        model.
        """
        found: dict[int, Pair] = {}
        for entry in self._each(plan, approximate):
            ((index, (weight, bias)),) = replaced_weights([entry], [entry.approximation]).items()
            dtype = onnx.helper.tensor_dtype_to_np_dtype(entry.layer.type)
            found[index] = weight.astype(dtype), bias
        return found

    def held_back(self, plan: Plan) -> Float64:
        """Loss that decisions follow, of each held-back sample, before refit; computed once."""
        if plan not in self._held_back:
            self._held_back[plan] = self.judge.followed.losses(self.weights(plan))
        return self._held_back[plan]

    def refitted_weights(self, plan: Plan) -> Weights:
        """Weights and biases of the chosen layers after refit."""
        return replaced_weights(self.chosen(plan), self.refitted(plan)[0])

    def refitted(self, plan: Plan) -> tuple[Sequence[Approximation], int]:
        """Refit a plan's layers, once for each plan; also return how many were changed."""
        if plan not in self._refitted:
            samples = self.judge.dataset.calibration
            known = self._held_back.get(plan)
            before = None if known is None else float(known.mean())
            self._refitted[plan] = self.refitted_to(samples, self.chosen(plan), before=before)
        return self._refitted[plan]

    def refitted_to(
        self,
        samples: Sequence[int],
        chosen: Sequence[ChosenLayer],
        stage: str = "refit",
        before: float | None = None,
    ) -> tuple[Sequence[Approximation], int]:
        """Refit layers to some samples, as far as the selection split loses less.

        `before` is the loss there before refit, if it is known.
        """
        # With the outputs that are compared, so that these follow from any layer on.
        return refit_layers(
            self.judge.follows[0],
            chosen,
            lambda: self.judge.batches(samples),
            self.judge.followed,
            threads=self.context.threads,
            before=before,
            progress=partial(self.context.progress, stage),
        )
