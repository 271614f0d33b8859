"""Choose ranks so that the whole model, as measured, meets a latency budget.

What stands for the time while ranks are chosen, a table of layer times or MACs, ignores what
layers do to each other: caches, layouts, fused operators. So the whole model is timed under the
plan that it gives. The ratio of actual to predicted saving corrects the next limit; once a plan is
fast enough, it comes from a curve through all plans timed so far.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from cobla_onnx.allocation import Budget, Constraint
from cobla_onnx.allocation.budget import rounded_up
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.model_file import without_weights
from cobla_onnx.graph.macs import Shape
from cobla_onnx.latency.profile import WHOLE, Profile
from cobla_onnx.latency.timing import Comparison, Stopwatch, compare
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.aims import Aims
from cobla_onnx.pipeline.search.eight_bits import computes_products, spared_outputs
from cobla_onnx.pipeline.search.problem import SearchResult
from cobla_onnx.pipeline.search.stand_in import stand_in_model
from cobla_onnx.pipeline.search.ways import NOISE, Choose, Found, Way, fast_enough, within_noise
from cobla_onnx.plan import Plan
from cobla_onnx.runtime.session import Feeds, open_session, runnable_feeds
from cobla_onnx.variants.writing import Storage
from cobla_onnx.wording import option_name

__all__ = ["LatencySearch", "example_feeds"]

# Most allocations in a row, each with the table corrected by the measurements so far.
ROUNDS = 6
# The same in 8 bits, of which MACs say little: a dearer plan may be as fast as one that is close to
# the limit, so that the search goes on.
THOROUGH = 8
# Most of those that follow where a sketch has found the limit.
FINAL = 5
# Most nodes, from the input on, that are left in floating point beside 8 bits, and what the time
# falls to with one more.
HEAD, FASTER = 3, 0.99
# Seconds, and least and most runs, for timing the original and a plan in turn.
SECONDS, LEAST, MOST = 6.0, 9, 200


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

    def under(
        self, analysis: Analysis, plan: Plan, eight_bits: bool = False, head: int = 0
    ) -> Comparison:
        """Time the original and the model under a plan in turn, with random factors.

        With `eight_bits`, its nodes compute so, in ranges of no meaning, but for the first `head`.
        """
        key = self._key(analysis, plan, eight_bits) + f" after {head}" * (head > 0)
        if key not in self._entry["plans"]:
            compressed = stand_in_model(
                self.model, analysis, plan, self.storage, eight_bits=eight_bits, head=head
            )
            self._entry["plans"][key] = asdict(self.compare(compressed))
        return Comparison(**self._entry["plans"][key])

    def _fastest(
        self, analysis: Analysis, plan: Plan, eight_bits: bool
    ) -> tuple[Comparison, int | None]:
        """Time a plan; in 8 bits, with as many of the first nodes in floating point as pay.

        A convolution of an image has three channels, with which products in 8 bits are slow. What
        follows it in 8 bits may be slower for it, so that it depends on the model and the ranks.

        Returns
        -------
        measured : Comparison
        head : int or None
            That many nodes; None if nothing is in 8 bits, or only products of matrices.
        """
        best, head = self.under(analysis, plan, eight_bits), 0
        if not eight_bits or not self._has_head:
            return best, None
        while head < HEAD:
            other = self.under(analysis, plan, eight_bits, head + 1)
            if other.ratio > FASTER * best.ratio:
                break
            best, head = other, head + 1
        return best, head

    @cached_property
    def _has_head(self) -> bool:
        """Whether the first nodes can be left by themselves: not those of a model of products."""
        return not computes_products(self.model)

    def _key(self, analysis: Analysis, plan: Plan, eight_bits: bool) -> str:
        """Name a plan in the profile, by all that its running time depends on."""
        chosen = [d for d in plan.decisions if d.scheme is not None]
        text = Plan(tuple(chosen)).to_json() + " qdq" * (self.storage == "qdq")
        if eight_bits:
            # What options leave as it is stays in floating point, too.
            text += " ".join(sorted(spared_outputs(self.model, analysis)))
        return hashlib.sha256(text.encode()).hexdigest()[:16] + " in 8 bits" * eight_bits

    def tried(
        self, way: Way, budget: Budget, is_worth: Callable[[Found], bool] = lambda found: True
    ) -> list[Found]:
        """Choose ranks until the measured time is close to the budget.

        Parameters
        ----------
        way : Way
        budget : Budget
            With a latency limit.
        is_worth : callable
            Whether a plan of `Way.sketch` or `Way.draft` that is fast enough is worth a better one.

        Returns
        -------
        list of Found
            All plans that were timed, or those alone that `Way.choose` or `Way.draft` gave if one
            of them is fast enough.
        """
        limit = budget.latency
        assert limit is not None
        alone = 1.0
        if way.eight_bits:
            alone = self._fastest(way.analysis, Plan(()), True)[0].ratio
        aims = Aims(way.proxy, limit, alone)
        rounds = THOROUGH if way.eight_bits else ROUNDS
        if way.sketch is None or way.draft is None:
            return self._tuned(way, way.choose, aims, aims.first(), rounds, way.eight_bits)
        sketched = self._tuned(way, way.sketch, aims, aims.first(), rounds, way.eight_bits)
        near = fast_enough(sketched, limit)
        if near is None or not is_worth(near):
            return sketched
        found = self._tuned(way, way.draft, aims, near.wanted, FINAL)
        best = fast_enough(found, limit)
        if best is None:
            return [*found, *sketched]
        if not is_worth(best):
            return found
        settled = self._settled(way, aims, best)
        return [settled] if fast_enough([settled], limit) else found

    def _settled(self, way: Way, aims: Aims, draft: Found) -> Found:
        """Choose within the limit of a draft, and time it if that is another plan."""
        result = way.choose([*way.others, draft.wanted])
        if result.allocation.choices == draft.allocation.choices:
            return replace(draft, result=replace(result, head=draft.result.head))
        return self._try(way, aims, result, draft.wanted)

    def _tuned(
        self,
        way: Way,
        choose: Choose,
        aims: Aims,
        wanted: Constraint,
        rounds: int,
        thorough: bool = False,
    ) -> list[Found]:
        """Choose and time plans, from a first limit of what stands for the time on.

        Until one is close to the budget, unless it is to be `thorough`.
        """
        found = list[Found]()
        for _ in range(rounds):
            try:
                result = choose([*way.others, wanted])
            except BudgetError as error:
                if wanted.name not in error.least:
                    raise
                # The table may be wrong: try its fastest plan before refusing the budget.
                wanted = replace(wanted, limit=math.ceil(error.least[wanted.name] * wanted.total))
                result = choose([*way.others, wanted])
            choices = result.allocation.choices
            if any(choices == earlier.allocation.choices for earlier in found):
                break
            found.append(self._try(way, aims, result, wanted))
            close = aims.is_close(found[-1].measured.ratio)
            if (close and not thorough) or not any(choices):
                break
            wanted = aims.next(found)
        return found

    def _try(self, way: Way, aims: Aims, result: SearchResult, wanted: Constraint) -> Found:
        choices = result.allocation.choices
        predicted = aims.predicted(way.proxy.cost(way.analysis.curves, choices))
        plan = result.plan(way.analysis)
        measured, head = self._fastest(way.analysis, plan, way.eight_bits)
        return Found(way, replace(result, head=head), wanted, predicted, measured)

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
            return measured, within_noise(limit, measured)
        raise BudgetError(
            f"{option_name('latency', limit)}: the result takes {measured.ratio:.3f} of the "
            f"original's time ({measured.low:.3f} to {measured.high:.3f}); the machine may be "
            "busy, or its profile out of date",
            {"latency": rounded_up(measured.ratio)},
            "try again with a new one",
        )


def _model_key(model: onnx.ModelProto, feeds: Feeds) -> str:
    """Hash everything a model's time depends on: its graph without weights, and its inputs."""
    digest = hashlib.sha256(without_weights(model).SerializeToString(deterministic=True))
    for name, value in sorted(feeds.items()):
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
    return digest.hexdigest()[:16]
