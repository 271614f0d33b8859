"""Latency budgets: choose ranks by measured time, and report it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx

from cobla_onnx.allocation import Allocation, Budget, Constraint
from cobla_onnx.latency.layer_times import slowest_layers, time_layers
from cobla_onnx.latency.profile import Conditions, Profile
from cobla_onnx.latency.timing import Comparison, Stopwatch
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.build_report import latency_report
from cobla_onnx.pipeline.search.latency import LatencySearch, example_feeds
from cobla_onnx.plan import Plan
from cobla_onnx.report.model import LatencyReport
from cobla_onnx.runtime.progress import Progress
from cobla_onnx.runtime.providers import current_provider

__all__ = ["Timed", "open_profile"]


def open_profile(path: str | os.PathLike[str] | None, threads: int) -> Profile:
    """Read the profile for these conditions, or start a new one.

    Raises
    ------
    UsageError
        If it does not fit.
    """
    conditions = Conditions.here(threads, current_provider())
    return Profile(conditions) if path is None else Profile.open(path, conditions)


@dataclass
class Timed:
    """A model and its measured times.

    Parameters
    ----------
    model : onnx.ModelProto
    analysis : Analysis
        Of all layers.
    profile : Profile
    path : path, optional
        File of the profile.
    seed : int
        Of the random inputs.
    progress : callable
    stopwatch : Stopwatch
    """

    model: onnx.ModelProto
    analysis: Analysis
    profile: Profile
    path: str | os.PathLike[str] | None
    seed: int
    progress: Progress
    stopwatch: Stopwatch
    _predicted: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        feeds = example_feeds(
            self.model, self.analysis.input_shapes, self.stopwatch.threads, self.seed
        )
        self._search = LatencySearch(self.model, feeds, self.profile, self.stopwatch)

    def table(self) -> Analysis:
        """Return the analysis with times, without layers that would not be faster."""
        total = self._search.original()
        variants, slower = time_layers(
            self.model,
            self.analysis.variants,
            self.analysis.shapes,
            self.profile,
            self.stopwatch,
            lambda done, total: self.progress("time layers", done, total),
        )
        self._save()
        return self.analysis.with_times(total, variants, slower)

    def start_over(self) -> None:
        """Forget the prediction for the last budget; measurements are kept."""
        self._predicted = None

    def choose(
        self,
        analysis: Analysis,
        budget: Budget,
        choose: Callable[[Sequence[Constraint]], Allocation],
    ) -> Allocation:
        """Choose ranks that meet a latency budget; see `LatencySearch.meet`."""
        try:
            found = self._search.meet(analysis, budget, choose)
        finally:
            self._save()
        self._predicted = found.predicted
        return found.allocation

    def report(
        self, compressed: onnx.ModelProto, plan: Plan, limit: float | None
    ) -> tuple[LatencyReport, tuple[str, ...]]:
        """Time the result and its slowest layers; also return notes.

        Raises
        ------
        BudgetError
            If the result takes more than `limit` of the original's time, beyond the noise.
        """
        self.progress("time the result", 0, 1)
        measured: Comparison
        if compressed is self.model:
            measured, note = self._search.unchanged(), ""
        elif limit is None:
            measured, note = self._search.compare(compressed), ""
        else:
            measured, note = self._search.confirm(compressed, limit)
        analysis = self.analysis
        layers = slowest_layers(
            self.model, analysis.layers, analysis.shapes, plan, self.profile, self.stopwatch
        )
        self._save()
        self.progress("time the result", 1, 1)
        report = latency_report(measured, self._predicted, layers, self.stopwatch.threads)
        return report, (note,) if note else ()

    def _save(self) -> None:
        if self.path is not None:
            self.profile.save(self.path)
