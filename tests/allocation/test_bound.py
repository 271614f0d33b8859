"""The front is a bound: the knapsack's answer never lies below it, and touches it at corners."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.allocation import LayerCurves, WeightError, allocate
from cobla_onnx.allocation.bound import least_losses
from cobla_onnx.allocation.budget import Constraint
from cobla_onnx.variants.low_rank.curve import rank_curve


def random_layers(seed: int, count: int) -> list[LayerCurves]:
    rng = np.random.default_rng(seed)
    layers = []
    for number in range(count):
        curves = []
        for scheme in range(rng.integers(1, 4)):
            values = np.sort(rng.exponential(size=rng.integers(3, 12)))[::-1]
            per_rank = int(rng.integers(1, 9))
            curves.append(
                rank_curve(f"s{scheme}", values, np.arange(1, len(values)), per_rank, None)
            )
        whole = max(c.most * c.per_level["mem"] for c in curves)
        layers.append(LayerCurves(f"l{number}", {"mem": whole}, tuple(curves)))
    return layers


@given(st.integers(0, 10_000), st.integers(1, 5), st.floats(0.05, 1.0), st.integers(0, 50))
@settings(max_examples=60)
def test_no_choice_lies_below_the_front(seed, count, share, saved):
    """Whether or not something is saved before any choice, as what was stored twice."""
    layers = random_layers(seed, count)
    whole = sum(layer.costs["mem"] for layer in layers) + 7
    total = whole + saved
    least = Constraint("mem", 1.0, total, total, 7).least(layers)
    limit = int(least + share * (whole - least))
    constraint = Constraint("mem", limit / total, total, limit, 7)
    objective = WeightError(layers)
    losses = [[objective.curve(i, k) for k in range(len(x.curves))] for i, x in enumerate(layers)]
    # As many points as there are segments: then the line is the bound everywhere.
    front = least_losses(layers, losses, constraint, points=4000)
    assert front.kept[0] == whole / total
    assert front.losses[0] == 0.0
    assert np.all(np.diff(front.kept) < 0)
    assert np.all(np.diff(front.losses) >= 0)
    value = allocate(layers, objective, [constraint], solver="milp").certificate.value
    bound = np.interp(limit / total, front.kept[::-1], front.losses[::-1])
    assert value >= bound - 1e-9
    # The corner at the least cost is reached by real choices.
    tight = Constraint("mem", front.kept[-1], total, round(front.kept[-1] * total), 7)
    reached = allocate(layers, objective, [tight], solver="milp").certificate.value
    assert abs(reached - front.losses[-1]) < 1e-9
