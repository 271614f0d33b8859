"""Measured times of a model: the table of its layers, and the time of a result."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import onnx

from cobla_onnx.latency.layer_times import slowest_layers, time_layers
from cobla_onnx.latency.profile import Conditions, Profile
from cobla_onnx.latency.timing import Stopwatch
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.build_report import latency_report
from cobla_onnx.pipeline.search.latency import LatencySearch, example_feeds
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import LatencyReport
from cobla_onnx.runtime.context import RunContext
from cobla_onnx.runtime.providers import current_provider
from cobla_onnx.variants.writing import Storage

__all__ = ["ModelTimes", "open_profile"]


def open_profile(path: str | os.PathLike[str] | None, threads: int) -> Profile:
    """Read the profile for these conditions, or start a new one.

    Raises
    ------
    UsageError
        If it does not fit.
    """
    conditions = Conditions.here(threads, current_provider())
    return Profile(conditions) if path is None else Profile.open(path, conditions)


@dataclass(frozen=True)
class ModelTimes:
    """Times a model, its layers and its results; the profile keeps all but those of results.

    Attributes
    ----------
    analysis : Analysis
        Of all layers.
    search : LatencySearch
        Times the model, whole and under plans.
    context : RunContext
    """

    analysis: Analysis
    search: LatencySearch
    context: RunContext

    @classmethod
    def of(
        cls,
        model: onnx.ModelProto,
        analysis: Analysis,
        profile: Profile,
        stopwatch: Stopwatch,
        seed: int,
        context: RunContext,
        storage: Storage = "auto",
    ) -> ModelTimes:
        """Prepare to time a model on random inputs.

        Raises
        ------
        ModelError
            If onnxruntime does not load or run it.
        """
        feeds = example_feeds(model, analysis.input_shapes, stopwatch.threads, seed)
        return cls(analysis, LatencySearch(model, feeds, profile, stopwatch, storage), context)

    def table(self) -> Analysis:
        """Return the analysis with times, without layers that would not be faster."""
        search = self.search
        total = search.original()
        variants, slower = time_layers(
            search.model,
            self.analysis.variants,
            self.analysis.shapes,
            search.profile,
            search.stopwatch,
            partial(self.context.progress, "time layers"),
            search.storage,
        )
        search.profile.keep()
        return self.analysis.with_times(total, variants, slower)

    def report(
        self,
        compressed: onnx.ModelProto,
        plan: Plan | None,
        limit: float | None,
        predicted: float | None,
    ) -> tuple[LatencyReport, tuple[str, ...]]:
        """Time a result and its slowest layers; also return notes.

        Parameters
        ----------
        plan : Plan, optional
            Without one no layers are timed: those that compute in 8 bits are not, alone.
        limit : float, optional
            Largest fraction of the original's time.
        predicted : float, optional
            The fraction that the search predicted.

        Raises
        ------
        BudgetError
            If the result takes longer than the limit allows, beyond the noise.
        """
        search, notes = self.search, tuple[str, ...]()
        self.context.progress("time the result", 0, 1)
        if compressed is search.model:
            measured = search.unchanged()
        elif limit is None:
            measured = search.compare(compressed)
        else:
            measured, note = search.confirm(compressed, limit)
            notes = (note,) if note else ()
        layers = [] if plan is None else self._slowest(plan)
        search.profile.keep()
        self.context.progress("time the result", 1, 1)
        return latency_report(measured, predicted, layers, search.stopwatch.threads), notes

    def _slowest(self, plan: Plan) -> list[tuple[str, int, int]]:
        search, analysis = self.search, self.analysis
        return slowest_layers(
            search.model,
            analysis.layers,
            analysis.shapes,
            plan,
            search.profile,
            search.stopwatch,
            storage=search.storage,
        )
