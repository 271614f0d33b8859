"""Which ranks are tried for budgets, from costs alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest

from cobla_onnx import Budget
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.io.model_file import stored_bytes
from cobla_onnx.graph.layers import find_layers
from cobla_onnx.pipeline.reach import ranks_in_reach
from cobla_onnx.runtime.shapes import model_costs
from cobla_onnx.variants.base import Asked, Candidate, LayerCosts
from cobla_onnx.variants.low_rank.ranks import EVERY_RANK, RankGrid, RankRule
from cobla_onnx.variants.work import candidate
from tests.builders import small_network

MODEL = small_network()
SHAPES, MACS, _ = model_costs(MODEL, {"x": (1, 3, 12, 12)}, True, 1)
TOTALS = {"mem": stored_bytes(MODEL), "mac": sum(MACS.values()), "latency": None}
COARSE, FINER = RankRule(RankGrid(8), RankGrid(8)), RankRule(RankGrid(4), RankGrid(4))
# Between what multiples of 8 and what multiples of 4 can reach, and below what any rank can.
TIGHT, IMPOSSIBLE = Budget(mem=0.3), Budget(mem=0.01)


@cache
def under(rule: RankRule) -> Sequence[Candidate]:
    asked = Asked("auto", rule)
    return [
        candidate(layer, LayerCosts(sum(MACS[use.node] for use in layer.uses), SHAPES), asked)
        for layer in find_layers(MODEL).layers
    ]


def reached(*budgets: Budget, rules: Sequence[RankRule] = (COARSE, FINER, EVERY_RANK)) -> RankRule:
    found, used = ranks_in_reach(budgets, rules, under, TOTALS)
    assert found is under(used)
    return used


def test_the_first_rule_is_kept_where_it_is_enough():
    assert reached() is COARSE
    assert reached(Budget(mem=0.9)) is COARSE
    assert reached(Budget(mem=0.9, mac=0.9)) is COARSE


def test_a_finer_rule_is_taken_where_only_it_reaches_the_budget():
    with pytest.raises(BudgetError):
        reached(TIGHT, rules=[COARSE])
    assert reached(TIGHT) is FINER
    # Also with others that the first would reach, and with a limit on time, which is not judged.
    assert reached(Budget(mem=0.9), TIGHT) is FINER
    assert reached(Budget(mem=0.3, latency=0.001)) is FINER
    assert reached(Budget(latency=0.001)) is COARSE


def test_a_budget_that_no_rule_reaches_does_not_ask_for_finer_ranks_than_the_others():
    assert reached(Budget(mem=0.9), IMPOSSIBLE) is COARSE
    assert reached(TIGHT, IMPOSSIBLE) is FINER


def test_what_no_rule_reaches_is_refused_with_the_least_of_the_last_rule():
    with pytest.raises(BudgetError, match=r"0\.01.* is below the least reachable") as coarse:
        reached(IMPOSSIBLE, rules=[COARSE])
    with pytest.raises(BudgetError, match=r"0\.01.* is below the least reachable") as finest:
        reached(IMPOSSIBLE)
    assert 0.01 < finest.value.least["mem"] < TIGHT.mem < coarse.value.least["mem"]
    # The least is itself in reach.
    assert reached(Budget(mem=finest.value.least["mem"])) is EVERY_RANK
    with pytest.raises(BudgetError, match=r"0\.02") as last:
        reached(IMPOSSIBLE, Budget(mem=0.02))
    assert last.value.least == finest.value.least
