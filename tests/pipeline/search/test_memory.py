"""Ranks for a budget of bytes in 8 bits: nearly all of it is used, whatever does not shrink."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx import Budget
from cobla_onnx.allocation.budget import rounded_up
from cobla_onnx.errors import BudgetError
from cobla_onnx.pipeline.search.memory import EightBitMemory

TOTAL = 1_000_000


class Counted(EightBitMemory):
    """Bytes by a rule, for plans that are the floating-point bytes that they take.

    Attributes
    ----------
    levels : int64 array
        Bytes of all plans there are, ascending.
    """

    def __init__(self, levels, kept, rate, bend):
        limits = lambda budget: {"mem": int(budget.mem * TOTAL)}  # noqa: E731
        super().__init__(None, SimpleNamespace(limits=limits, mem_total=TOTAL))
        self.__dict__.update(levels=levels, kept=kept, rate=rate, bend=bend, searches=0)

    def under(self, plan):
        taken = plan if isinstance(plan, int) else TOTAL
        share = (taken / TOTAL) ** self.bend
        return round(TOTAL * (self.kept + (self.rate - self.kept) * share))

    def search(self, budget):
        self.__dict__["searches"] += 1
        fitting = self.levels[self.levels <= budget.mem * TOTAL]
        if not len(fitting):
            raise BudgetError("none", {"mem": rounded_up(Fraction(int(self.levels[0]), TOTAL))})
        taken = int(fitting[-1])
        certificate = SimpleNamespace(reached={"mem": taken})
        return SimpleNamespace(
            plan=lambda analysis: taken, allocation=SimpleNamespace(certificate=certificate)
        )

    def best(self, limit):
        """Most bytes of a plan within a limit; None where none is."""
        bytes_ = [self.under(int(level)) for level in self.levels]
        return max((each for each in bytes_ if each <= limit), default=None)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.floats(1.005, 1.06), min_size=80, max_size=80),
    st.floats(0.01, 0.25),
    st.floats(0.3, 0.6),
    st.floats(0.7, 1.4),
    st.floats(0.05, 0.6),
)
def test_nearly_all_of_a_budget_is_used(steps, kept, rate, bend, mem):
    levels = (TOTAL / np.cumprod(steps)[::-1]).astype(np.int64)
    memory = Counted(levels, kept, rate, bend)
    limit, best = int(mem * TOTAL), memory.best(int(mem * TOTAL))
    if memory.original <= limit:
        return
    if best is None:
        with pytest.raises(BudgetError, match="least that was reached in 8 bits"):
            memory.meet(Budget(mem=mem), memory.search)
    else:
        reached = memory.under(memory.meet(Budget(mem=mem), memory.search).plan(None))
        assert 0.9 * best <= reached <= limit
    assert memory.searches <= 20


def test_what_does_not_shrink_takes_no_more_than_a_few_searches():
    """Bytes in proportion would be approached from above, a few of a hundred at a time."""
    memory = Counted(np.arange(20_000, TOTAL, 1_000), 0.3, 0.6, 1.0)
    reached = memory.under(memory.meet(Budget(mem=0.4), memory.search).plan(None))
    assert 0.98 * 400_000 <= reached <= 400_000
    assert memory.searches <= 4
