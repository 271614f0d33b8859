"""Blocks of masks: a partition that can express where it starts, and costs that add up."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.allocation import WeightError, allocate
from cobla_onnx.allocation.blocks import Space, active_schemes, partition, refine, warm_masks
from cobla_onnx.allocation.budget import Budget
from cobla_onnx.errors import BudgetError
from tests.allocation.test_solve import layers_of, totals


def curves_of(objective, layers):
    """Losses of single layers, by layer and scheme."""
    return [
        [objective.curve(i, s) for s in range(len(layer.curves))] for i, layer in enumerate(layers)
    ]


@given(st.integers(0, 50), st.floats(0.3, 0.9), st.integers(2, 12))
@settings(max_examples=40)
def test_a_partition_covers_each_mask_once_and_keeps_its_start(seed, mem, variables):
    layers = layers_of(seed, 3, 9)
    if not layers:
        return
    constraints = Budget(mem=mem).constraints(layers, totals(layers))
    objective = WeightError(layers)
    try:
        start = allocate(layers, objective, constraints, solver="milp").choices
    except BudgetError:
        return
    losses, weights = curves_of(objective, layers), np.ones(1)
    schemes, tails = active_schemes(layers, losses, constraints, start, weights)
    space = Space(layers, losses, constraints, schemes, tails)
    flat = warm_masks(space, start)
    blocks = partition(space, tails, weights, flat, variables)
    finer = refine(space, blocks, flat, variables)
    for cut in (blocks, finer):
        assert cut.starts[0] == 0
        assert (np.diff(cut.starts) > 0).all()
        assert cut.sizes.sum() == len(flat)
        np.testing.assert_allclose(cut.costs.sum(axis=1), space.costs.sum(axis=1))
        # Every block is wholly taken or wholly left out at the start.
        mean = np.add.reduceat(flat, cut.starts) / cut.sizes
        assert set(np.round(mean, 12)) <= {0.0, 1.0}
    assert set(blocks.starts) <= set(finer.starts)
