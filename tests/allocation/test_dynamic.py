"""Dynamic programming over one budget, against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.allocation import dynamic
from cobla_onnx.allocation.dynamic import solve_programme

# Costs of choices with their losses, for each of up to four layers.
problems = st.lists(
    st.lists(st.tuples(st.integers(0, 300), st.floats(0, 10)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def best_of_all(problem, room):
    """The least loss of all combinations that fit."""
    fitting = [
        sum(loss for _, loss in combination)
        for combination in itertools.product(*problem)
        if sum(cost for cost, _ in combination) <= room
    ]
    return min(fitting, default=np.inf)


@pytest.mark.parametrize("steps", [1 << 16, 40])
@given(problem=problems, room=st.integers(-5, 900))
def test_nothing_is_better_and_what_is_found_fits(steps, problem, room):
    layer = np.repeat(np.arange(len(problem)), [len(choices) for choices in problem])
    cost, loss = (np.array(column) for column in zip(*itertools.chain(*problem), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "STEPS", steps)
        found = solve_programme(layer, loss, cost, room)
    best = best_of_all(problem, room)
    assert found.bound <= best + 1e-9
    if found.columns is not None:
        assert layer[found.columns].tolist() == list(range(len(problem)))
        assert cost[found.columns].sum() <= room
        assert loss[found.columns].sum() >= best - 1e-9
    if steps > 900:
        # Nothing is rounded, so it is the best.
        assert (found.columns is None) == np.isinf(best)
        assert found.bound == pytest.approx(best)
