"""The allocation against brute force, its budgets and its certificate."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from cobla_onnx.allocation import Budget, Choice, LayerCurves, WeightError, allocate
from cobla_onnx.allocation.blocks import active_schemes
from cobla_onnx.allocation.knapsack import knapsack, solved
from cobla_onnx.allocation.objective import Masks, masks_of
from cobla_onnx.allocation.resources import known_costs
from cobla_onnx.allocation.slsqp import Effort, relax
from cobla_onnx.errors import BudgetError, UsageError
from cobla_onnx.variants.low_rank.curve import rank_curve


def layers_of(seed: int, count: int, most: int, schemes: int = 2) -> list[LayerCurves]:
    generator = np.random.default_rng(seed)
    layers = []
    for index in range(count):
        curves = []
        mem, mac = int(generator.integers(40, 400)), int(generator.integers(400, 9000))
        for scheme in range(schemes):
            full = int(generator.integers(2, most + 2))
            values = np.sort(generator.exponential(size=full))[::-1] ** 2
            unit, speed = int(generator.integers(3, 40)), int(generator.integers(20, 900))
            ranks = min(full, (mem - 1) // unit, mac // speed)
            if ranks >= 1:
                steps = np.arange(1, ranks + 1)
                curves.append(rank_curve(f"scheme{scheme}", values, steps, unit, speed))
        if curves:
            layers.append(
                LayerCurves(f"layer{index}", known_costs(mem=mem, mac=mac), tuple(curves))
            )
    return layers


def options_of(layer: LayerCurves) -> list[Choice | None]:
    every = [Choice(k, int(r)) for k, c in enumerate(layer.curves) for r in c.levels]
    return [None, *every]


def totals(layers: list[LayerCurves], extra: int = 50, time: int | None = None) -> dict[str, int]:
    mac = sum(layer.costs.get("mac", 0) for layer in layers) + 10 * extra
    mem = sum(layer.costs["mem"] for layer in layers) + extra
    return known_costs(mem=mem, mac=mac, latency=time)


def feasible_choices(layers, constraints):
    """All choices within the limits, by brute force."""
    return [
        choices
        for choices in itertools.product(*map(options_of, layers))
        if all(c.cost(layers, choices) <= c.limit for c in constraints)
    ]


@given(st.integers(0, 10_000), st.floats(0.15, 0.99), st.floats(0.15, 0.99), st.integers(0, 2))
@settings(max_examples=60)
def test_agrees_with_brute_force(seed, mem, mac, which):
    layers = layers_of(seed, 3, 5)
    if not layers:
        return
    budget = Budget(mem=mem if which != 1 else None, mac=mac if which != 0 else None)
    constraints = budget.constraints(layers, totals(layers))
    objective = WeightError(layers)
    feasible = feasible_choices(layers, constraints)
    if not feasible:
        with pytest.raises(BudgetError) as caught:
            allocate(layers, objective, constraints)
        least = caught.value.least
        assert least
        raised = Budget(**({"mem": budget.mem, "mac": budget.mac} | least))
        allocate(layers, objective, raised.constraints(layers, totals(layers)))
        return
    best = min(objective.value(masks_of(layers, choices)) for choices in feasible)
    for solver in ("milp", "slsqp"):
        result = allocate(layers, objective, constraints, solver=solver)
        proof = result.certificate
        assert proof.value == pytest.approx(best, rel=2e-3, abs=1e-9)
        assert proof.lower_bound <= best + 1e-9
        assert proof.value >= proof.lower_bound
        for constraint in constraints:
            assert constraint.cost(layers, result.choices) <= constraint.limit
            assert proof.reached[constraint.name] == constraint.cost(layers, result.choices)


@pytest.mark.parametrize(
    ("seed", "mem", "mac"),
    [
        (2851, 0.4565489017289589, 0.5841801878112928),
        (9595, 0.3224573123317521, 0.45589633038533384),
        (9636, 0.5709306809197163, 0.724548278786658),
        (3811, 0.2502872452262009, 0.40569120912361745),
    ],
)
def test_bounds_of_small_losses_hold(seed, mem, mac):
    """A solver that takes a gap of 1e-6 for none had proved what is not so."""
    layers = layers_of(seed, 3, 5)
    constraints = Budget(mem=mem, mac=mac).constraints(layers, totals(layers))
    objective = WeightError(layers)
    found = feasible_choices(layers, constraints)
    best = min(objective.value(masks_of(layers, choices)) for choices in found)
    proof = allocate(layers, objective, constraints, solver="milp").certificate
    assert proof.lower_bound <= best
    assert best - 1e-12 <= proof.value <= best * (1 + 2e-3) + 1e-12


@pytest.mark.parametrize("gap", [1e-3, 5e-3])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.9])
def test_a_solution_is_within_the_gap_of_its_bound_or_there_is_none(kept, gap):
    layers = layers_of(3, 6, 12)
    constraints = Budget(mem=kept, mac=0.95 * kept).constraints(layers, totals(layers))
    errors = WeightError(layers)
    losses = [[errors.curve(i, k) for k in range(len(x.curves))] for i, x in enumerate(layers)]
    found = solved(layers, losses, constraints, relative_gap=gap)
    if found is None:
        with pytest.raises(BudgetError):
            knapsack(layers, losses, constraints, relative_gap=gap)
        return
    assert all(c.cost(layers, found.choices) <= c.limit for c in constraints)
    assert found.value - found.lower_bound <= gap * found.value + 1e-9


@given(st.integers(0, 10_000))
@settings(max_examples=40)
def test_the_least_that_is_named_is_within_reach_and_less_is_not(seed):
    layers = layers_of(seed, 4, 6)
    if not layers:
        return
    total = totals(layers)
    with pytest.raises(BudgetError) as caught:
        allocate(
            layers,
            WeightError(layers),
            Budget(mem=0.0001).constraints(layers, total),
        )
    least = caught.value.least["mem"]
    assert f"{least:g}" in str(caught.value)
    for solver in ("milp", "slsqp"):
        allocate(
            layers,
            WeightError(layers),
            Budget(mem=least).constraints(layers, total),
            solver=solver,
        )
    with pytest.raises(BudgetError):
        allocate(
            layers,
            WeightError(layers),
            Budget(mem=least - 0.0002).constraints(layers, total),
        )


def test_of_two_limits_out_of_reach_each_least_is_that_of_one_alone():
    layers = layers_of(3, 4, 6)
    constraints = Budget(mem=0.0001, mac=0.0001).constraints(layers, totals(layers))
    with pytest.raises(
        BudgetError, match=r"and mac=.* least reachable .*, each taken alone; raise"
    ):
        allocate(layers, WeightError(layers), constraints)
    with pytest.raises(BudgetError) as caught:
        allocate(layers, WeightError(layers), constraints[:1])
    assert "alone" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.1, 1.5])
def test_nonsense_budgets_are_refused(value):
    with pytest.raises(UsageError, match="mem="):
        Budget(mem=value)
    with pytest.raises(UsageError, match="mac="):
        Budget(mac=value)


def test_a_budget_is_needed_and_one_is_met_by_keeping_all():
    with pytest.raises(UsageError, match="mem=, mac= or latency="):
        Budget()
    layers = layers_of(1, 4, 6)
    result = allocate(
        layers, WeightError(layers), Budget(mem=1.0).constraints(layers, totals(layers))
    )
    assert result.choices == (None,) * len(layers)
    assert result.certificate.value == 0


def test_limits_are_those_of_the_decimal_that_was_given():
    (constraint,) = Budget(mem=0.3).constraints([], {"mem": 1000})
    assert constraint.limit == 300


def test_gradient_agrees_with_finite_differences():
    layers = layers_of(3, 4, 8)
    objective = WeightError(layers)
    generator = np.random.default_rng(0)
    values = tuple(generator.random(layer.curves[0].most) for layer in layers)
    masks = Masks((0,) * len(layers), values)
    gradient = objective.gradient(masks)
    for index, mask in enumerate(values):
        for j in range(len(mask)):
            step = np.zeros_like(mask)
            step[j] = 1e-6
            either = [
                objective.value(
                    Masks(masks.schemes, (*values[:index], mask + s, *values[index + 1 :]))
                )
                for s in (step, -step)
            ]
            assert (either[0] - either[1]) / 2e-6 == pytest.approx(gradient[index][j], abs=1e-7)


def test_curves_are_the_objective_at_binary_masks():
    layers = layers_of(5, 3, 8)
    objective = WeightError(layers)
    for index, layer in enumerate(layers):
        for choice in options_of(layer)[1:]:
            choices = [None] * len(layers)
            choices[index] = choice
            expected = objective.curve(index, choice.curve)[choice.level]
            assert objective.value(masks_of(layers, choices)) == pytest.approx(expected)


def big_layers(count: int = 12, full: int = 64) -> list[LayerCurves]:
    """Layers of one scheme whose spectra fall at different speeds."""
    layers = []
    for index in range(count):
        values = np.exp(-np.arange(full) / (4 + 2 * index))
        curve = rank_curve("channel", values, np.arange(1, full // 2), 2 * full, 20 * full)
        layers.append(
            LayerCurves(f"layer{index}", {"mem": full * full, "mac": 10 * full * full}, (curve,))
        )
    return layers


def test_slsqp_solves_the_relaxed_problem():
    """Against an independent solution: the minimum over the box at a price, by bisection."""
    layers = big_layers()
    objective = WeightError(layers)
    constraints = Budget(mem=0.4).constraints(layers, totals(layers, 0))
    losses = [[objective.curve(i, 0)] for i in range(len(layers))]
    warm = knapsack(layers, losses, constraints)
    relaxed = relax(
        layers, objective, losses, constraints, warm.choices, warm.multipliers, Effort(2000)
    )
    assert relaxed.masks is not None, relaxed.problem
    assert relaxed.kkt_residual < 1e-3
    energies, costs = [], []
    for layer, tail in zip(layers, relaxed.tails, strict=True):
        values = np.square(layer.curves[0].spectrum)
        energy = values / values.sum()
        unit = layer.curves[0].per_level["mem"]
        energies += [*energy[:tail], energy[tail:].sum()]
        costs += [unit] * tail + [layer.costs["mem"] - tail * unit]
    energy, cost = np.array(energies), np.array(costs, dtype=float)

    def masks(price: float) -> np.ndarray:
        return np.clip(1 - price * cost / (2 * energy), 0, 1)

    price = brentq(lambda p: cost @ masks(p) - constraints[0].limit, 1e-12, 1.0, xtol=1e-15)
    best = float(energy @ np.square(1 - masks(price)))
    assert relaxed.value == pytest.approx(best, rel=2e-2)
    assert relaxed.value >= best * (1 - 1e-6)
    assert relaxed.multipliers["mem"] == pytest.approx(price * totals(layers, 0)["mem"], rel=0.1)


def test_blocks_keep_the_number_of_variables_small():
    layers = big_layers(30, 256)
    result = allocate(
        layers, WeightError(layers), Budget(mem=0.5).constraints(layers, totals(layers, 0))
    )
    assert 0 < result.certificate.variables <= 200
    assert result.certificate.kkt_residual < 1e-3
    assert not result.certificate.notes


def test_multipliers_are_what_loosening_a_budget_buys():
    layers = big_layers()
    objective = WeightError(layers)
    total = totals(layers, 0)

    def solve(mem: float):
        return allocate(
            layers, objective, Budget(mem=mem).constraints(layers, total), solver="milp"
        ).certificate

    low, middle, high = solve(0.45), solve(0.5), solve(0.55)
    slope = (low.value - high.value) / 0.1
    assert middle.multipliers["mem"] == pytest.approx(slope, rel=0.2)


class BrokenObjective(WeightError):
    """An objective that is not a number once masks are relaxed."""

    def gradient(self, masks):
        return tuple(np.full_like(mask, np.nan) for mask in masks.values)


def test_a_broken_objective_falls_back_to_the_knapsack_and_says_so():
    layers = big_layers()
    constraints = Budget(mem=0.5).constraints(layers, totals(layers, 0))
    result = allocate(layers, BrokenObjective(layers), constraints)
    assert "not finite" in result.certificate.notes[0]
    expected = allocate(layers, WeightError(layers), constraints, solver="milp")
    assert result.choices == expected.choices


class SkewedObjective(WeightError):
    """The true loss of the first layer is ten times what its separable model says."""

    def value(self, masks):
        first = Masks(masks.schemes, (masks.values[0], *map(np.ones_like, masks.values[1:])))
        return super().value(masks) + 9 * super().value(first)

    def gradient(self, masks):
        gradient = super().gradient(masks)
        return (10 * gradient[0], *gradient[1:])


def test_slsqp_is_better_where_the_separable_model_is_wrong():
    layers = big_layers()
    constraints = Budget(mem=0.4).constraints(layers, totals(layers, 0))
    objective = SkewedObjective(layers)
    plain = allocate(layers, objective, constraints, solver="milp").certificate.value
    solved = allocate(layers, objective, constraints, solver="slsqp").certificate.value
    assert solved < plain


def test_zero_weights_cost_nothing_to_drop():
    curve = rank_curve("matrix", np.zeros(8), np.arange(1, 4), 10, 10)
    layers = [LayerCurves("zero", {"mem": 100, "mac": 100}, (curve,)), *big_layers(2)]
    result = allocate(
        layers, WeightError(layers), Budget(mem=0.5).constraints(layers, totals(layers, 0))
    )
    assert result.choices[0] is not None
    assert np.isfinite(result.certificate.value)


@pytest.mark.parametrize("mac", [None, 0.8])
def test_a_search_ends_where_the_next_digit_is_not_worth_it(monkeypatch, mac):
    """Layers of equal cost, as in a transformer: plans by the thousand are as good as the best."""
    nodes, milp = [], scipy.optimize.milp

    def counted(*arguments, **options):
        nodes.append(milp(*arguments, **options))
        return nodes[-1]

    monkeypatch.setattr(scipy.optimize, "milp", counted)
    generator = np.random.default_rng(0)
    layers = []
    for number in range(18):
        long = 1536 if number % 6 > 3 else 384
        values = np.sort(generator.gamma(2.0, size=384))[::-1]
        ranks = np.arange(1, 384 * long // (384 + long))
        curve = rank_curve("matrix", values, ranks, 4 * (384 + long), 384 + long)
        whole = {"mem": 4 * 384 * long, "mac": 384 * long}
        layers.append(LayerCurves(str(number), whole, (curve,)))
    mem = sum(layer.costs["mem"] for layer in layers) + 47_000_000
    macs = sum(layer.costs["mac"] for layer in layers)
    for fraction in (0.74, 0.75, 0.76, 0.77):
        constraints = Budget(mem=fraction, mac=mac).constraints(layers, {"mem": mem, "mac": macs})
        found = allocate(layers, WeightError(layers), constraints, solver="milp").certificate
        assert found.gap <= 1e-3
    if mac is None:
        assert not nodes
    assert all(result.mip_node_count <= 20 for result in nodes)


def test_the_same_twice():
    layers = big_layers()
    constraints = Budget(mem=0.4, mac=0.5).constraints(layers, totals(layers, 0))
    first, second = (allocate(layers, WeightError(layers), constraints) for _ in range(2))
    assert first == second


def on_a_grid(layers: list[LayerCurves], step: int, start: int = 300) -> list[LayerCurves]:
    """The same with ranks that are multiples of `step`, and times that do not begin at 0."""
    result = []
    for number, layer in enumerate(layers):
        curves = []
        for curve in layer.curves:
            ranks = curve.levels[curve.levels % step == 0]
            slow = 1 + 0.2 * (number % 3)
            times = (start + slow * 10 * curve.per_level["mac"] * ranks).astype(np.int64)
            curves.append(curve.only(curve.levels % step == 0).with_cost("latency", times))
        whole = 10 * layer.costs.get("mac", 0) + start // 2
        result.append(replace(layer, curves=tuple(curves), costs={**layer.costs, "latency": whole}))
    return result


@pytest.mark.parametrize("solver", ["slsqp", "milp"])
@pytest.mark.parametrize("limit", [0.45, 0.7])
def test_a_budget_of_time_on_a_grid(solver, limit):
    layers = on_a_grid(big_layers(), 8)
    # The model is faster than the sum of its layers, each timed with its overhead.
    time = sum(layer.costs["latency"] for layer in layers) - 500
    budget = Budget(mem=0.8, latency=limit)
    constraints = budget.constraints(layers, totals(layers, 0, time))
    assert constraints[-1].fixed == -500
    result = allocate(layers, SkewedObjective(layers), constraints, solver=solver)
    assert not result.certificate.notes
    ranks = [choice.level for choice in result.choices if choice is not None]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)
    assert all(c.cost(layers, result.choices) <= c.limit for c in constraints)
    assert result.certificate.multipliers["latency"] > 0


def test_relaxed_masks_change_on_the_grid_alone_and_keep_the_time():
    layers = on_a_grid(big_layers(), 8)
    time = sum(layer.costs["latency"] for layer in layers)
    constraints = Budget(latency=0.5).constraints(layers, totals(layers, 0, time))
    objective = WeightError(layers)
    losses = [[objective.curve(i, 0)] for i in range(len(layers))]
    warm = knapsack(layers, losses, constraints)
    relaxed = relax(layers, objective, losses, constraints, warm.choices, warm.multipliers)
    assert relaxed.masks is not None, relaxed.problem
    assert relaxed.value <= warm.value
    used = 0.0
    for index, (layer, mask) in enumerate(zip(layers, relaxed.masks.values, strict=True)):
        edges = relaxed.masks.blocks(index)
        curve = layer.curves[0]
        assert set(edges.tolist()) <= {0, 64, *curve.levels.tolist()}
        path, tail = constraints[0].path(curve), relaxed.tails[index]
        rest = layer.costs["latency"] - path[tail]
        used += path[0] + np.diff(path)[:tail] @ mask[:tail] + rest * mask[tail:].mean()
    assert used <= constraints[0].limit * (1 + 1e-5)


@pytest.mark.parametrize("mem", [0.4, 0.6, 0.85])
def test_levels_that_are_not_nested_stay_as_the_knapsack_has_them(mem):
    """Every other layer has costs that are not proportional to its level, either."""
    layers = big_layers()
    for index in range(0, len(layers), 2):
        (curve,) = layers[index].curves
        costs = {name: np.sort(cost + 37 * (cost % 5)) for name, cost in curve.costs.items()}
        curve = replace(curve, costs=costs, per_level={}, nested=False)
        layers[index] = replace(layers[index], curves=(curve.only(curve.levels % 3 == 1),))
    constraints = Budget(mem=mem).constraints(layers, totals(layers, 0))
    objective = WeightError(layers)
    losses = [[objective.curve(i, 0)] for i in range(len(layers))]
    warm = knapsack(layers, losses, constraints)
    relaxed = relax(layers, objective, losses, constraints, warm.choices, warm.multipliers)
    assert relaxed.masks is not None, relaxed.problem
    moved = 0
    for index, (mask, choice) in enumerate(zip(relaxed.masks.values, warm.choices, strict=True)):
        rank = len(mask) if choice is None else choice.level
        as_it_was = np.arange(len(mask)) < rank
        if index % 2 == 0:
            np.testing.assert_array_equal(mask, as_it_was)
        moved += not np.array_equal(mask, as_it_was)
    assert moved
    found = allocate(layers, SkewedObjective(layers), constraints)
    assert constraints[0].cost(layers, found.choices) <= constraints[0].limit


def test_masks_of_a_whole_layer_move_where_levels_are_nested():
    layers = big_layers()
    for index, layer in enumerate(layers):
        (curve,) = layer.curves
        # The same, but of no cost: it is the best, and masks cannot move on it.
        free = {name: np.ones_like(cost) for name, cost in curve.costs.items()}
        other = replace(curve, scheme="other", costs=free, per_level={}, nested=False)
        layers[index] = replace(layer, curves=(other, curve))
    constraints = Budget(mem=0.5).constraints(layers, totals(layers, 0))
    losses = [[curve.errors for curve in layer.curves] for layer in layers]
    start = [None, Choice(0, 5), *[None] * (len(layers) - 2)]
    schemes, tails = active_schemes(layers, losses, constraints, start, np.ones(1))
    assert schemes == (1, 0, *[1] * (len(layers) - 2))
    assert tails[1] == 5


@given(st.integers(0, 10_000), st.floats(0.2, 0.95))
@settings(max_examples=40)
def test_a_budget_of_time_agrees_with_brute_force(seed, limit):
    layers = on_a_grid(layers_of(seed, 3, 5), 1)
    if not layers:
        return
    time = sum(layer.costs["latency"] for layer in layers) + 1000
    constraints = Budget(latency=limit).constraints(layers, totals(layers, time=time))
    objective = WeightError(layers)
    feasible = feasible_choices(layers, constraints)
    if not feasible:
        with pytest.raises(BudgetError, match="latency="):
            allocate(layers, objective, constraints)
        return
    best = min(objective.value(masks_of(layers, choices)) for choices in feasible)
    result = allocate(layers, objective, constraints, solver="milp")
    assert result.certificate.value == pytest.approx(best, rel=2e-3, abs=1e-9)
