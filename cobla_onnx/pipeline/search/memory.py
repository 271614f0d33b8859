"""Choose ranks so that a model meets a memory budget once its weights are stored in 8 bits.

The programme counts floating-point weights. How many bytes they take in 8 bits is nearly a quarter,
but not quite: a scale for each channel, a bias and what stays in floating point do not shrink. So
the model is quantised under the plan with ranges of no meaning, its bytes are counted, and the
limit of the programme follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import onnx

from cobla_onnx.allocation import Budget
from cobla_onnx.allocation.budget import rounded_up
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.problem import SearchResult
from cobla_onnx.pipeline.search.stand_in import stand_in_model
from cobla_onnx.plan import Plan
from cobla_onnx.variants.writing import Storage
from cobla_onnx.wording import option_name

__all__ = ["EightBitMemory"]

# Most limits of the programme that are tried, and the share of the budget that is close enough.
ROUNDS = 5
CLOSE = 0.98
# A budget that no ranks meet.
LEAST = 1e-9


@dataclass(frozen=True)
class EightBitMemory:
    """Counts bytes of a model in 8 bits, and meets memory budgets by them.

    Attributes
    ----------
    model : ModelProto
    analysis : Analysis
    storage : {'auto', 'cast', 'qdq'}
        How fewer bits are written.
    """

    model: onnx.ModelProto
    analysis: Analysis
    storage: Storage = "auto"

    def under(self, plan: Plan) -> int:
        """Bytes of the weights of the model in 8 bits under a plan."""
        made = stand_in_model(self.model, self.analysis, plan, self.storage, eight_bits=True)
        return stored_bytes(made)

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
        share, found = limit / self.original, dict[int, SearchResult]()
        for number in range(ROUNDS):
            # The last resort is the least that there is.
            last = number == ROUNDS - 1 and min(found) > limit
            tried = replace(budget, mem=LEAST if last else share)
            result, refused = self._searched(tried, search)
            reached = self.under(result.plan(self.analysis))
            found[reached] = result
            if refused or CLOSE * limit <= reached <= limit:
                break
            share = min(1.0, share * limit / reached)
            if reached > limit:
                # Of few layers the same plan may be the best one of a little less, too.
                own = result.allocation.certificate.reached["mem"] - 1
                share = min(0.998 * share, own / self.analysis.mem_total)
        fitting = [reached for reached in found if reached <= limit]
        if fitting:
            return found[max(fitting)]
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
