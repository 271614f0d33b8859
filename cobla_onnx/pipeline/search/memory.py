"""Choose ranks so that a model meets a memory budget once its weights are stored in 8 bits.

The programme counts floating-point weights. How many bytes they take in 8 bits is nearly a quarter,
but not quite: a scale for each channel, a bias and what stays in floating point do not shrink. So
the model is quantised under the plan with ranges of no meaning, its bytes are counted, and the
limit of the programme follows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from cobla_onnx.allocation import Budget
from cobla_onnx.allocation.budget import rounded_up
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.branches import Followed
from cobla_onnx.pipeline.search.eight_bits import spared_outputs, stand_in_eight_bits
from cobla_onnx.pipeline.search.problem import SearchResult
from cobla_onnx.pipeline.search.stand_in import stand_ins
from cobla_onnx.plan import Plan
from cobla_onnx.variants.writing import Storage
from cobla_onnx.wording import option_name

__all__ = ["EightBitMemory"]

# Most limits of the programme that are tried, and how many more if none of these used enough of the
# budget.
ROUNDS, MORE = 5, 5
# The share of the budget that is close enough, the one that is aimed at, and what is enough.
CLOSE, AIM, ENOUGH = 0.98, 0.99, 0.9
# A budget that no ranks meet.
LEAST = 1e-9


class _Tried(NamedTuple):
    """Ranks that were tried.

    Attributes
    ----------
    share : float
        Of the floating-point weights, that they were chosen within.
    own : float
        The one that they take.
    reached : int
        Bytes of the weights in 8 bits.
    """

    share: float
    own: float
    reached: int


def _next(tried: Sequence[_Tried], limit: int, step: float) -> float | None:
    """Share of floating-point weights that should take nearly as many bytes in 8 bits as allowed.

    Bytes are nearly linear in it, with a part that does not shrink. Between ranks that fit and
    ranks that do not it is where the line through both says, or halfway where one did not move.

    Parameters
    ----------
    tried : sequence of _Tried
    limit : int
        Bytes.
    step : float
        A share by which another plan must be smaller than one that is too large: of few layers
        the same one is the best of a little less, too.

    Returns
    -------
    float or None
        None if no others lie between those that were tried.
    """
    above = min((t for t in tried if t.reached > limit), key=lambda t: t.own, default=None)
    below = max(
        (t for t in tried if t.reached <= limit), key=lambda t: (t.own, t.share), default=None
    )
    if above is not None and below is not None:
        stuck = len({t.reached > limit for t in tried[-2:]}) == 1
        line = (AIM * limit - below.reached) / (above.reached - below.reached)
        low, high = max(below.share, below.own), above.own - step
        share = below.own + (0.5 if stuck else line) * (above.own - below.own)
        room = 0.1 * (high - low)
        return min(max(share, low + room), high - room) if low < high else None
    last = tried[-1]
    share = last.share * AIM * limit / last.reached
    if len(tried) > 1 and (last.own - tried[-2].own) * (last.reached - tried[-2].reached) > 0:
        slope = (last.own - tried[-2].own) / (last.reached - tried[-2].reached)
        share = last.own + slope * (AIM * limit - last.reached)
    if above is None:
        return min(max(share, 1.002 * last.own), 1.0)
    return max(min(share, 0.998 * last.share, above.own - step), LEAST)


@dataclass(frozen=True)
class EightBitMemory:
    """Counts bytes of a model in 8 bits, and meets memory budgets by them.

    Attributes
    ----------
    followed : Followed
    analysis : Analysis
    storage : {'auto', 'cast', 'qdq'}
        How fewer bits are written.
    """

    followed: Followed
    analysis: Analysis
    storage: Storage = "auto"

    def under(self, plan: Plan) -> int:
        """Bytes of the weights of the model in 8 bits under a plan, in all its branches."""
        model = self.followed.model
        replaced = stand_ins(model, self.analysis, plan, self.storage)
        made = self.followed.rewritten(replaced)
        return stored_bytes(stand_in_eight_bits(made, spared_outputs(model, self.analysis)))

    @cached_property
    def original(self) -> int:
        """Bytes of the weights of the original in 8 bits."""
        return self.under(Plan(()))

    def in_floats(self, share: float) -> float:
        """About the share of floating-point weights that takes a share of all bytes in 8 bits."""
        limit = self.analysis.limits(Budget(mem=share))["mem"]
        return min(1.0, CLOSE * limit / self.original)

    def meet(self, budget: Budget, search: Callable[[Budget], SearchResult]) -> SearchResult:
        """Choose ranks for a budget with a memory limit.

        Parameters
        ----------
        search : callable
            Chooses ranks for a budget whose memory is that of weights in floating point.

        Raises
        ------
        BudgetError
            If no plan is small enough; names the least that was found.
        """
        limit = self.analysis.limits(replace(budget, latency=None))["mem"]
        if self.original <= limit:
            return search(replace(budget, mem=1.0))
        found, tried = dict[int, SearchResult](), list[_Tried]()
        share = limit / self.original
        for number in range(1, ROUNDS + MORE + 1):
            result, refused = self._searched(replace(budget, mem=share), search)
            reached = self.under(result.plan(self.analysis))
            found[reached] = result
            own = result.allocation.certificate.reached["mem"] / self.analysis.mem_total
            tried.append(_Tried(share, own, reached))
            best = max((reached for reached in found if reached <= limit), default=0)
            enough = CLOSE if number < ROUNDS else ENOUGH
            if best >= enough * limit or (refused and reached > limit):
                break
            following = _next(tried, limit, 1 / self.analysis.mem_total)
            if number == ROUNDS and not best:
                # The last resort is the least that there is, and then what lies above it.
                following = LEAST
            if following is None:
                break
            share = following
        if best:
            return found[best]
        least = rounded_up(Fraction(min(found), self.analysis.mem_total))
        raise BudgetError(
            f"{option_name('mem', budget.mem)} is below the least that was reached in 8 bits, "
            f"{least:g}",
            {"mem": least},
            "raise it, or let more layers be compressed",
        )

    def _searched(
        self, budget: Budget, search: Callable[[Budget], SearchResult]
    ) -> tuple[SearchResult, bool]:
        """Return ranks, and whether they are the smallest there are."""
        try:
            return search(budget), False
        except BudgetError as error:
            if "mem" not in error.least:
                raise
            return search(replace(budget, mem=error.least["mem"])), True
