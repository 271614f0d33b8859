"""Candidates that others beat."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cobla_onnx.allocation.problem import VariantCurve
from cobla_onnx.allocation.pruning import undominated


def some_curve(rng: np.random.Generator, most: int, resources: int) -> VariantCurve:
    levels = np.sort(rng.choice(np.arange(1, most), rng.integers(1, most), replace=False))
    costs = {str(k): np.sort(rng.integers(1, 30, len(levels))) for k in range(resources)}
    # Few values, so that some are the same.
    errors = np.append(np.sort(rng.integers(1, 10, most))[::-1] / 10, 0.0)
    return VariantCurve("family", "scheme", levels, costs, errors)


@given(seed=st.integers(0, 9999), count=st.integers(1, 4), resources=st.integers(1, 3))
def test_what_is_left_is_the_pareto_front(seed: int, count: int, resources: int) -> None:
    rng = np.random.default_rng(seed)
    curves = [some_curve(rng, int(rng.integers(2, 20)), resources) for _ in range(count)]
    kept = undominated(curves)
    points = [
        [
            (float(c.errors[level]), *(int(cost[i]) for cost in c.costs.values()))
            for i, level in enumerate(c.levels)
        ]
        for c in curves
    ]
    everything = list(itertools.chain(*points))
    flags = np.concatenate(kept)
    assert len(flags) == len(everything)
    front = {everything[i] for i in np.flatnonzero(flags)}
    # Each point once, and every other one beaten by a point of the front.
    assert len(front) == flags.sum()
    for point in everything:
        assert any(all(np.array(f) <= np.array(point)) for f in front)
    for one, other in itertools.permutations(front, 2):
        assert not all(np.array(one) <= np.array(other))
