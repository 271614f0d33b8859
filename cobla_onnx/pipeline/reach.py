"""Tell which budgets can be met, and with which ranks, from costs alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from cobla_onnx.allocation import Budget, LayerCurves
from cobla_onnx.allocation.budget import NOTHING, require_reachable, within
from cobla_onnx.allocation.knapsack import knapsack
from cobla_onnx.errors import BudgetError
from cobla_onnx.variants.base import Candidate
from cobla_onnx.variants.low_rank.ranks import RankRule
from cobla_onnx.variants.registry import require_family

__all__ = ["ranks_in_reach"]


def ranks_in_reach(
    budgets: Sequence[Budget],
    rules: Sequence[RankRule],
    candidates: Callable[[RankRule], Sequence[Candidate]],
    totals: Mapping[str, int | None],
    saved: Mapping[str, int] = NOTHING,
) -> tuple[Sequence[Candidate], RankRule]:
    """Return the candidates of the first rule under which most budgets can be met.

    Parameters
    ----------
    budgets : sequence of Budget
        Latency limits are ignored: they cannot be judged before layers are timed.
    rules : sequence of RankRule
        Rules after the first are for budgets that it makes infeasible.
    candidates : callable
        Returns the layers' candidates under a rule.
    totals : mapping of str to (int or None)
        Costs of the model by the name of the resource; None where not known.
    saved : mapping of str to int
        See `Budget.constraints`.

    Raises
    ------
    BudgetError
        If no budget can be met under any rule; the error of the last budget.
    """
    untimed = [replace(b, latency=None) for b in budgets if b.mem is not None or b.mac is not None]
    best: tuple[int, Sequence[Candidate], RankRule] | None = None
    for rule in rules:
        found = candidates(rule)
        refusals = (_refusal(budget, found, totals, saved) for budget in untimed)
        errors = [error for error in refusals if error]
        if best is None or len(errors) < best[0]:
            best = len(errors), found, rule
        if not errors:
            break
    assert best is not None
    if budgets and best[0] == len(budgets):
        raise errors[-1]
    return best[1], best[2]


def _refusal(
    budget: Budget,
    candidates: Sequence[Candidate],
    totals: Mapping[str, int | None],
    saved: Mapping[str, int],
) -> BudgetError | None:
    layers = [_costs(candidate) for candidate in candidates if candidate.proposals]
    try:
        constraints = budget.constraints(layers, totals, saved)
        if within(constraints, layers, (None,) * len(layers)):
            return None
        require_reachable(layers, constraints)
        if len(constraints) > 1:
            nothing = [[np.zeros(c.most + 1) for c in x.curves] for x in layers]
            knapsack(layers, nothing, constraints)
    except BudgetError as error:
        return error
    return None


def _costs(candidate: Candidate) -> LayerCurves:
    """A layer's costs at all candidate levels, before its errors are known."""
    return candidate.curves(
        [
            require_family(p.form.name).curve(
                candidate.layer, candidate.costs, p, np.zeros(p.most + 1), np.zeros(p.most)
            )
            for p in candidate.proposals
        ]
    )
