"""Evidence from data: what is measured on the samples once, whatever the budget.

The calibration split gives the second moments, from which the factors follow, and the
sensitivity of each layer. The selection split, which no factor sees, decides between candidate
plans and between a layer's factors before and after refit. All these decisions follow one loss;
for class distributions that is their divergence at a temperature (see `soften`), unless the
divergence itself is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import onnx

from cobla_onnx.allocation import Choice, Constraint, LayerCurves
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.calibration.batching import TapLimit
from cobla_onnx.calibration.data.arrays import spread_over
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.evaluation.evaluator import Judge
from cobla_onnx.calibration.evaluation.gradients import GradientProbe
from cobla_onnx.calibration.evaluation.measured_model import MeasuredModel
from cobla_onnx.calibration.evaluation.quality import Quality, measure_quality
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.crossfit import CrossFit
from cobla_onnx.pipeline.search.finishing import Finisher
from cobla_onnx.pipeline.search.network_loss import LossPath
from cobla_onnx.pipeline.search.point_losses import PointLosses
from cobla_onnx.pipeline.search.sensitivity import (
    FIRST_SAMPLES,
    MANY,
    PROBE_SAMPLES,
    Sensitivity,
    affordable_samples,
    enough_samples,
)
from cobla_onnx.runtime.cache import Arrays, digest, fetch
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.runtime.temporary import Shelf
from cobla_onnx.variants.base import Approximation
from cobla_onnx.variants.from_data import FromData
from cobla_onnx.variants.work import weight_curves

__all__ = ["Evidence"]

# MACs that take as long as opening a session does for each byte of weights.
OPENING = 64


@dataclass(frozen=True)
class Evidence:
    """A model's analysis beside its calibration data.

    What it measures, it measures when first asked for and keeps. All that is kept is a function
    of the fields alone, or of these and the arguments: the order of questions changes no answer.

    Attributes
    ----------
    model : ModelProto
    analysis : Analysis
        With approximations from the calibration data.
    judge : Judge
        Probes of the loss.
    measured : MeasuredModel
        Where the loss is taken.
    context : RunContext
    taps : TapLimit, optional
        For the tensors that are read from a run.
    """

    model: onnx.ModelProto
    analysis: Analysis
    judge: Judge
    measured: MeasuredModel
    context: RunContext = field(default_factory=RunContext)
    taps: TapLimit | None = None
    _sensitivities: dict[tuple[frozenset[str], bool], Sensitivity] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def dataset(self) -> Dataset:
        """The samples, and how they are split."""
        return self.judge.dataset

    @property
    def from_data(self) -> FromData:
        """Makes approximations from the calibration split."""
        assert self.analysis.from_data is not None
        return self.analysis.from_data

    def judged(self, outputs: Shelf) -> tuple[Float64, Quality]:
        """Compare outputs on the samples held back with those of the original.

        Parameters
        ----------
        outputs : Shelf
            Batch by batch, as `judge.selection` has them.

        Returns
        -------
        float64 array, shape (samples,)
            The loss as it is stated.
        Quality
        """
        probe = self.judge.selection
        losses = probe.losses_of(zip(probe.expected, outputs, strict=True))
        quality = measure_quality(probe, zip(probe.expected, outputs, strict=True))
        # Users know the outputs, not the tensors that are measured in their place.
        output = self.measured.outputs.get(quality.output, quality.output)
        return losses, replace(quality, output=output)

    def judged_model(self, model: onnx.ModelProto) -> tuple[Float64, Quality]:
        """Run a model, optimised, on the samples held back and compare it with the original.

        Parameters
        ----------
        model : ModelProto
            With the inputs of the original, and the measured tensors.

        Returns
        -------
        float64 array, shape (samples,)
            See `judged`.
        Quality

        Raises
        ------
        ModelError
            If onnxruntime does not run it.
        """
        return self.judged(Shelf(self._outputs(model)))

    def _outputs(self, model: onnx.ModelProto) -> Iterator[Feeds]:
        probe = self.judge.selection
        session = open_session(model, self.context.threads, tuple(probe.measures), optimized=True)
        for feeds, expected in zip(probe.batches, probe.expected, strict=True):
            found = run_session(session, feeds)
            yield {name: found[name] for name in expected if name in found}

    def finisher(self) -> Finisher:
        """Return a maker of factors for one budget: it keeps the plans that it has judged."""
        threads = min(self.context.threads, self.context.pool.runs_at_most)
        context = replace(self.context, threads=threads)
        return Finisher(self.model, self.analysis, self.judge, context)

    def crossfit(self, finisher: Finisher) -> CrossFit:
        """Return the cross-fitting of a finisher's plans; the halves' statistics are kept."""
        return self._crossfit.by(finisher)

    @cached_property
    def _crossfit(self) -> CrossFit:
        return CrossFit(self.finisher())

    def sensitivity(self, constraints: Sequence[Constraint], final: bool = False) -> Sensitivity:
        """Measure the layers, once for each set of limited resources.

        Parameters
        ----------
        final : bool
            Whether nothing will be refined, so that all samples are used at once.

        Returns
        -------
        Sensitivity
            A copy: what one search refines, no other one sees.
        """
        asked = frozenset(constraint.name for constraint in constraints), final
        if asked not in self._sensitivities:
            samples, first = self.probe_samples, None
            # In a model of many layers, points near the first ones are not measured again.
            final |= len(self.analysis.curves) > MANY
            if not final and len(samples) > FIRST_SAMPLES:
                first = self._losses_on(spread_over(samples, FIRST_SAMPLES))
            found = Sensitivity(self._losses_on(samples), first)
            found.measure(constraints, partial(self.context.progress, "sensitivity"))
            self._sensitivities[asked] = found
        return self._sensitivities[asked].copy()

    def _losses_on(self, samples: Sequence[int]) -> PointLosses:
        return PointLosses(
            self.analysis.variants,
            self.from_data,
            self.judge.spread_on(samples, self.context.pool, self._runs_take_long(samples)),
            self.context.cache,
            self._key(samples),
        )

    def _runs_take_long(self, samples: Sequence[int]) -> bool:
        """Whether running a layer on samples takes longer than opening a session of the model."""
        macs = (self.analysis.mac_total or 0) * len(samples) / max(len(self.analysis.curves), 1)
        return macs > OPENING * self.analysis.mem_total

    def _key(self, samples: Sequence[int]) -> str:
        """Hash what losses on samples depend on, apart from the weights; empty without a cache."""
        if self.context.cache is None:
            return ""
        return digest(self.from_data.key, self.judge.key(samples))

    @cached_property
    def probe_samples(self) -> Sequence[int]:
        """Samples on which layers are truncated one at a time.

        Losses of class distributions differ much from sample to sample. Those of images hardly
        do, and cost the most: a pilot run with all layers truncated a little shows how many
        samples are enough. In a model of many layers the cost decides.
        """
        layers, samples = len(self.analysis.curves), self.dataset.calibration
        if layers > MANY:
            return spread_over(samples, affordable_samples(layers, len(samples)))
        chosen = spread_over(samples, PROBE_SAMPLES)
        if any(measure.kind != "mse" for measure in self.judge.measures.values()):
            return chosen

        def pilot() -> Arrays:
            layers = self.analysis.curves
            largest = [Choice(0, int(layer.curves[0].levels[-1])) for layer in layers]
            weights = self.finisher().weights(self.analysis.plan(largest))
            return {"losses": self.judge.on(chosen).losses(weights)}

        key = digest(self._key(chosen), "pilot")
        found = fetch(self.context.cache, "loss", key, pilot)
        return spread_over(chosen, enough_samples(found["losses"]))

    @cached_property
    def gradients(self) -> GradientProbe:
        """The gradient graph, opened on the whole calibration split.

        Raises
        ------
        ModelError
            If the model has none.
        """
        probe = self.judge.on(self.dataset.calibration)
        return GradientProbe(probe, self.context.threads)

    def path(self) -> LossPath:
        """Return the truncations of all layers."""

        def approximate(layer: int, curve: int, ranks: Sequence[int]) -> Sequence[Approximation]:
            found = self.analysis.layers[layer], self.analysis.forms[layer][curve]
            return self.from_data.approximate(*found, ranks)

        return LossPath(self.judge.whole, approximate)

    @cached_property
    def weight_curves(self) -> tuple[LayerCurves, ...]:
        """The curves of the analysis, with the errors of the weights themselves."""
        return weight_curves(self.model, self.analysis.variants, self.context)
