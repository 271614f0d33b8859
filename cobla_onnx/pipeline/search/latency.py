"""Choose ranks so that the whole model, as measured, meets a latency budget.

The table of layer times ignores interactions between layers: caches, layouts, fused operators.
So the whole model is timed under the plan that the table gives. The ratio of actual to predicted
saving corrects the table, and the allocation is repeated; once a plan is fast enough, the next
target comes from a curve through all plans timed so far.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from scipy.interpolate import PchipInterpolator

from cobla_onnx.allocation import Allocation, Budget, Constraint
from cobla_onnx.allocation.sqp import Step
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.model_file import without_weights
from cobla_onnx.graph.macs import Shape
from cobla_onnx.latency.profile import WHOLE, Profile
from cobla_onnx.latency.timing import Comparison, Stopwatch, compare
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.problem import SearchResult
from cobla_onnx.plan import Plan
from cobla_onnx.runtime.session import Feeds, open_session, runnable_feeds
from cobla_onnx.variants.registry import stand_in
from cobla_onnx.variants.rewrite import rewrite
from cobla_onnx.variants.writing import Storage, Writing
from cobla_onnx.wording import option_name

__all__ = ["Found", "LatencySearch", "example_feeds"]

# Most allocations in a row, each with the table corrected by the measurements so far.
ROUNDS = 6
# A plan is close enough if it uses at least this fraction of the limit.
CLOSE = 0.98
# Fraction of the limit that is aimed at, since the next measurement differs by the noise.
AIM = 0.995
# The next plan keeps this fraction of the distance between its two neighbours from either.
INSIDE = 0.1
# Bounds on the ratio of actual to predicted saving.
LEAST_SCALE, MOST_SCALE = 0.2, 3.0
# Seconds, and least and most runs, for timing the original and a plan in turn.
SECONDS, LEAST, MOST = 6.0, 9, 200
# Excess over the limit, as a fraction of it, that still counts as met within the noise.
NOISE = 0.03

Choose = Callable[[Sequence[Constraint]], SearchResult]


@dataclass(frozen=True)
class Found:
    """A result, its predicted fraction of the original's time, and the measured one."""

    result: SearchResult
    predicted: float
    measured: Comparison

    @property
    def allocation(self) -> Allocation:
        """The ranks."""
        return self.result.allocation


def example_feeds(
    model: onnx.ModelProto, shapes: dict[str, Shape], threads: int, seed: int
) -> Feeds:
    """Draw random inputs for one run that the model accepts.

    Raises
    ------
    ModelError
        If onnxruntime does not load or run it.
    """
    session = open_session(model, threads, optimized=True)
    return runnable_feeds(session, shapes, seed)[0][0]


@dataclass(frozen=True)
class LatencySearch:
    """Times a model, whole and under plans; times found in the profile are not measured again.

    Parameters
    ----------
    model : onnx.ModelProto
    feeds : dict
        Inputs of one run.
    profile : Profile
    stopwatch : Stopwatch
    storage : {'auto', 'cast', 'qdq'}
        How fewer bits are written.
    """

    model: onnx.ModelProto
    feeds: Feeds
    profile: Profile
    stopwatch: Stopwatch
    storage: Storage = "auto"

    @cached_property
    def _entry(self) -> dict[str, Any]:
        return self.profile.model(_model_key(self.model, self.feeds))

    def original(self) -> int:
        """Return the time of the original in nanoseconds."""
        if self._entry[WHOLE] is None:
            times = self.stopwatch.times(
                [self.model], self.feeds, seconds=SECONDS / 2, least=LEAST, most=MOST
            )
            self._entry[WHOLE] = max(round(1e9 * float(np.nanmedian(times))), 1)
        return int(self._entry[WHOLE])

    def compare(self, compressed: onnx.ModelProto) -> Comparison:
        """Time the original and another model in turn, without using the profile."""
        times = self.stopwatch.times(
            [self.model, compressed], self.feeds, seconds=SECONDS, least=LEAST, most=MOST
        )
        return compare(times)

    def unchanged(self) -> Comparison:
        """Time the original alone, for a model that was not changed."""
        times = self.stopwatch.times(
            [self.model], self.feeds, seconds=SECONDS / 2, least=LEAST, most=MOST
        )
        return compare(np.repeat(times, 2, axis=1))

    def under(self, analysis: Analysis, plan: Plan) -> Comparison:
        """Time the original and the model under a plan in turn, with random factors."""
        chosen = [d for d in plan.decisions if d.scheme is not None]
        text = Plan(tuple(chosen)).to_json() + " qdq" * (self.storage == "qdq")
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self._entry["plans"]:
            writing = Writing.into(self.model, self.storage)
            made = [stand_in(*analysis.resolve(d)).written(writing) for d in chosen]
            compressed = rewrite(self.model, made)
            self._entry["plans"][key] = asdict(self.compare(compressed))
        return Comparison(**self._entry["plans"][key])

    def meet(self, analysis: Analysis, budget: Budget, choose: Choose) -> Found:
        """Choose ranks until the measured time meets the budget.

        Parameters
        ----------
        analysis : Analysis
            With layer times, see `time_layers`.
        budget : Budget
            With a latency limit.
        choose : callable
            Returns the best allocation within constraints.

        Returns
        -------
        Found
            Its history is that of all rounds; all else is of the round that gave the answer.

        Raises
        ------
        BudgetError
            If no plan that was tried is fast enough; names the fastest.
        """
        limit = budget.latency
        assert limit is not None
        *others, latency = analysis.constraints(budget)
        wanted, tried = _corrected(latency, 1.0), list[Found]()
        history = list[Step]()
        for _ in range(ROUNDS):
            try:
                result = choose([*others, wanted])
            except BudgetError as error:
                if "latency" not in error.least:
                    raise
                # The table may be wrong: try its fastest plan before refusing the budget.
                wanted = replace(latency, limit=math.ceil(error.least["latency"] * latency.total))
                result = choose([*others, wanted])
            history += result.history
            choices = result.allocation.choices
            if any(choices == found.allocation.choices for found in tried):
                break
            tried.append(self._try(analysis, latency, result))
            ratio = tried[-1].measured.ratio
            if CLOSE * limit <= ratio <= limit or not any(choices):
                break
            wanted = _aimed(latency, limit, tried)
        best = _best(tried, limit, self.stopwatch.threads)
        answer = replace(best.result, history=tuple(history), predicted=best.predicted)
        return replace(best, result=answer)

    def _try(self, analysis: Analysis, latency: Constraint, result: SearchResult) -> Found:
        choices = result.allocation.choices
        predicted = latency.cost(analysis.curves, choices) / latency.total
        return Found(result, predicted, self.under(analysis, analysis.plan(choices)))

    def confirm(self, compressed: onnx.ModelProto, limit: float) -> tuple[Comparison, str]:
        """Time the result itself, twice if the first time is over the limit.

        Returns
        -------
        comparison : Comparison
        note : str
            Empty if the limit is met without allowing for noise.

        Raises
        ------
        BudgetError
            If it is over the limit by more than the noise.
        """
        measured = self.compare(compressed)
        if measured.ratio > limit:
            measured = self.compare(compressed)
        if measured.ratio <= limit:
            return measured, ""
        if measured.ratio <= limit * (1 + NOISE):
            return measured, _within_noise(limit, measured)
        raise BudgetError(
            f"{option_name('latency', limit)}: the result takes {measured.ratio:.3f} of the "
            f"original's time ({measured.low:.3f} to {measured.high:.3f}); the machine may be "
            "busy, or its profile out of date",
            {"latency": _rounded_up(measured.ratio)},
            "try again with a new one",
        )


def _model_key(model: onnx.ModelProto, feeds: Feeds) -> str:
    """Hash everything a model's time depends on: its graph without weights, and its inputs."""
    digest = hashlib.sha256(without_weights(model).SerializeToString(deterministic=True))
    for name, value in sorted(feeds.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
    return digest.hexdigest()[:16]


def _corrected(latency: Constraint, scale: float) -> Constraint:
    """Tighten the limit on predicted time, assuming `scale` of the predicted saving is realised.

    This equals scaling all savings of the table, with the limit changed instead.
    """
    allowed = AIM * latency.limit if latency.limit < latency.total else latency.limit
    limit = math.floor(latency.total - (latency.total - allowed) / scale)
    return replace(latency, limit=min(limit, latency.total))


def _aimed(latency: Constraint, limit: float, tried: Sequence[Found]) -> Constraint:
    """Limit the predicted time so that the measured time should meet the limit.

    While no plan is fast enough, from the saving of the last one; then from the monotone curve
    through all plans and the original, well between the nearest plans on either side.
    """
    if not any(found.measured.ratio <= limit for found in tried):
        return _corrected(latency, _scale(tried[-1]))
    promised = {found.measured.ratio: found.predicted for found in tried} | {1.0: 1.0}
    ratios = sorted(promised)
    curve = PchipInterpolator(ratios, [promised[ratio] for ratio in ratios])
    low = promised[max(ratio for ratio in ratios if ratio <= limit)]
    high = promised[min((ratio for ratio in ratios if ratio > limit), default=1.0)]
    least, most = sorted((low + INSIDE * (high - low), high - INSIDE * (high - low)))
    aim = min(max(float(curve(AIM * limit)), least), most)
    return replace(latency, limit=math.floor(aim * latency.total))


def _scale(found: Found) -> float:
    """Return the ratio of actual to predicted saving."""
    promised, saved = 1.0 - found.predicted, 1.0 - found.measured.ratio
    if promised <= 0:
        return 1.0
    return min(max(saved / promised, LEAST_SCALE), MOST_SCALE)


def _best(tried: Sequence[Found], limit: float, threads: int) -> Found:
    """Return the slowest plan that is fast enough, since it loses least."""
    met = [found for found in tried if found.measured.ratio <= limit]
    if met:
        return max(met, key=lambda found: found.measured.ratio)
    fastest = min(tried, key=lambda found: found.measured.ratio)
    measured = fastest.measured
    if measured.low <= limit and measured.ratio <= limit * (1 + NOISE):
        noted = fastest.allocation.noting(_within_noise(limit, measured))
        return replace(fastest, result=replace(fastest.result, allocation=noted))
    raise BudgetError(
        f"{option_name('latency', limit)}: the fastest of {len(tried)} plans takes "
        f"{measured.ratio:.3f} of the original's time ({measured.low:.3f} to {measured.high:.3f}, "
        f"{threads} threads)",
        {"latency": _rounded_up(measured.ratio)},
        "raise it, or let more layers be compressed",
    )


def _within_noise(limit: float, measured: Comparison) -> str:
    return (
        f"the latency budget of {limit:g} is met within the noise only: {measured.ratio:.3f} was "
        f"measured ({measured.low:.3f} to {measured.high:.3f})"
    )


def _rounded_up(ratio: float) -> float:
    return math.ceil(ratio * 10_000) / 10_000
