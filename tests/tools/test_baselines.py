"""The rules of the literature against plain, slow versions of themselves."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cobla_onnx.allocation import Budget, Choice, Constraint, LayerCurves
from cobla_onnx.allocation.resources import known_costs
from cobla_onnx.errors import BudgetError
from cobla_onnx.variants.low_rank.curve import rank_curve

TOOL = Path(__file__).resolve().parents[2] / "tools" / "baselines.py"
spec = importlib.util.spec_from_file_location("baselines", TOOL)
assert spec is not None
assert spec.loader is not None
baselines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(baselines)

NAMES = tuple(baselines.RULES)
EXTRA = 50


def layer_of(values: Sequence[float], unit: int, whole: int, name: str = "layer") -> LayerCurves:
    """A layer that is only counted in bytes."""
    array = np.array(values, dtype=np.float64)
    ranks = np.arange(1, min(len(array), (whole - 1) // unit) + 1)
    return LayerCurves(name, {"mem": whole}, (rank_curve("matrix", array, ranks, unit, None),))


def random_layers(seed: int, count: int = 3, most: int = 7) -> list[LayerCurves]:
    """Layers with two costs; some ranks are left out, and some singular values are 0."""
    generator = np.random.default_rng(seed)
    layers = []
    for index in range(count):
        full = int(generator.integers(2, most + 1))
        values = np.sort(generator.exponential(size=full))[::-1] ** 2
        values[full - int(generator.integers(0, 2)) * int(generator.integers(0, full)) :] = 0.0
        unit, speed = int(generator.integers(3, 40)), int(generator.integers(20, 900))
        mem = unit + 1 + int(unit * generator.uniform(0, full - 1))
        mac = speed + int(speed * generator.uniform(0, full - 1))
        ranks = np.arange(1, min(full, (mem - 1) // unit, mac // speed) + 1)
        keep = generator.random(len(ranks)) < 0.8
        ranks = ranks[keep] if keep.any() else ranks
        curve = rank_curve("matrix", values, ranks, unit, speed)
        layers.append(LayerCurves(f"layer{index}", known_costs(mem=mem, mac=mac), (curve,)))
    return layers


def constraints_of(
    layers: Sequence[LayerCurves], mem: float | None, mac: float | None
) -> tuple[Constraint, ...]:
    macs = sum(layer.costs.get("mac", 0) for layer in layers)
    total = sum(layer.costs["mem"] for layer in layers) + EXTRA
    return Budget(mem, mac).constraints(layers, {"mem": total, "mac": macs + EXTRA})


def fits(layers, constraints, choices) -> bool:
    return all(c.cost(layers, choices) <= c.limit for c in constraints)


def options_of(layer: LayerCurves) -> list[Choice | None]:
    return [*(Choice(0, int(r)) for r in layer.curves[0].levels), None]


def share_lost(layer: LayerCurves, choice: Choice | None) -> float:
    squares = layer.curves[0].spectrum ** 2
    return 0.0 if choice is None else math.fsum(squares[choice.level :]) / math.fsum(squares)


def relative_norm(layer: LayerCurves, choice: Choice | None) -> float:
    values = layer.curves[0].spectrum
    whole = choice is None or choice.level == len(values)
    return 0.0 if whole else float(values[choice.level] / values[0])


def within(layers, error, most: float) -> tuple[Choice | None, ...]:
    """The smallest ranks whose error is at most ``most``."""
    return tuple(
        next(o for o in options_of(layer) if error(layer, o) <= most * (1 + 1e-12) + 1e-15)
        for layer in layers
    )


def slow_tolerance(error, layers, constraints) -> tuple[Choice | None, ...]:
    """All tolerances from the strictest; the first whose ranks fit."""
    every = sorted({error(layer, o) for layer in layers for o in options_of(layer)})
    states = [within(layers, error, most) for most in every]
    return next(state for state in states if fits(layers, constraints, state))


def slow_uniform(layers, constraints) -> tuple[Choice | None, ...]:
    ratios = sorted(
        {
            Fraction(rank, len(layer.curves[0].spectrum))
            for layer in layers
            for rank in layer.curves[0].levels.tolist()
        },
        reverse=True,
    )
    for ratio in [*ratios, Fraction(0)]:
        choices = []
        for layer in layers:
            curve = layer.curves[0]
            below = curve.levels[curve.levels <= math.floor(ratio * len(curve.spectrum))]
            choices.append(Choice(0, int(below[-1] if len(below) else curve.levels[0])))
        if fits(layers, constraints, choices):
            return tuple(choices)
    raise AssertionError


def slow_greedy(layers, constraints) -> tuple[Choice | None, ...]:
    """The paper's loop as it is written: look at all layers before each drop."""
    ranks = [len(layer.curves[0].spectrum) for layer in layers]
    whole = [True] * len(layers)

    def counted() -> tuple[Choice | None, ...]:
        return tuple(None if w else Choice(0, r) for r, w in zip(ranks, whole, strict=True))

    while not fits(layers, constraints, counted()):
        found = []
        for index, layer in enumerate(layers):
            curve = layer.curves[0]
            lower = curve.levels[curve.levels < ranks[index] + whole[index]]
            if not len(lower):
                continue
            after = ranks[index] - 1 if ranks[index] - 1 > curve.levels[-1] else int(lower[-1])
            squares = curve.spectrum**2
            kept = math.fsum(squares[: ranks[index]]) or 1.0
            unit = sum(curve.per_level[c.name] / c.total for c in constraints)
            saved = unit * max(ranks[index] - after, 1)
            ratio = math.fsum(squares[after : ranks[index]]) / kept / saved
            found.append((ratio, index, after))
        _, index, after = min(found)
        ranks[index] = after
        whole[index] = after > layers[index].curves[0].levels[-1]
    return counted()


def slow_balf(layers, constraints) -> tuple[Choice | None, ...]:
    """Every multiplier at which a layer may change its mind, and one between neighbours."""

    def price(layer: LayerCurves, option: Choice | None) -> float:
        return sum((c.cost([layer], [option]) - c.fixed) / c.total for c in constraints)

    table = [
        [(share_lost(layer, o), price(layer, o), o) for o in options_of(layer)] for layer in layers
    ]
    corners = {0.0}
    for rows in table:
        for (e1, p1, _), (e2, p2, _) in itertools.combinations(rows, 2):
            if p2 > p1 and e1 > e2:
                corners.add((e1 - e2) / (p2 - p1))
    ordered = [*sorted(corners), 2 * max(corners) + 1]
    for low, high in itertools.pairwise(ordered):
        middle = (low + high) / 2
        choices = tuple(min(rows, key=lambda r: r[0] + middle * r[1])[2] for rows in table)
        if fits(layers, constraints, choices):
            return choices
    raise AssertionError


SLOW = {
    "uniform": slow_uniform,
    "equal-energy": lambda la, c: slow_tolerance(share_lost, la, c),
    "greedy-energy-product": slow_greedy,
    "alds": lambda la, c: slow_tolerance(relative_norm, la, c),
    "balf": slow_balf,
}


def cases() -> st.SearchStrategy[tuple[int, float | None, float | None]]:
    share = st.floats(0.15, 1.0)
    both = st.one_of(
        st.tuples(share, st.none()), st.tuples(st.none(), share), st.tuples(share, share)
    )
    return st.tuples(st.integers(0, 100_000), both).map(lambda pair: (pair[0], *pair[1]))


@pytest.mark.parametrize("name", NAMES)
@given(case=cases())
@settings(max_examples=120)
def test_agrees_with_a_plain_search(name, case):
    seed, mem, mac = case
    layers = random_layers(seed)
    constraints = constraints_of(layers, mem, mac)
    whole = (None,) * len(layers)
    smallest = tuple(options_of(layer)[0] for layer in layers)
    rule = baselines.RULES[name]
    if not fits(layers, constraints, smallest):
        with pytest.raises(BudgetError, match="least reachable"):
            rule(layers, constraints)
    elif fits(layers, constraints, whole):
        assert rule(layers, constraints) == whole
    else:
        choices = rule(layers, constraints)
        assert fits(layers, constraints, choices)
        assert choices == SLOW[name](layers, constraints)


def between(first: Sequence[LayerCurves]) -> Iterator[tuple[Choice | None, ...]]:
    yield from itertools.product(*map(options_of, first))


@given(seed=st.integers(0, 100_000), mem=st.floats(0.3, 0.95))
@settings(max_examples=60)
def test_alds_is_the_minimax_of_all_choices(seed, mem):
    layers = random_layers(seed)
    constraints = constraints_of(layers, mem, None)
    feasible = [c for c in between(layers) if fits(layers, constraints, c)]
    if not feasible:
        return

    def worst(choices) -> float:
        return max(relative_norm(la, c) for la, c in zip(layers, choices, strict=True))

    result = baselines.alds(layers, constraints)
    assert worst(result) == pytest.approx(min(map(worst, feasible)), rel=1e-12, abs=1e-15)


@given(seed=st.integers(0, 100_000), mem=st.floats(0.3, 0.95))
@settings(max_examples=60)
def test_no_choices_of_the_same_cost_lose_less_than_those_of_balf(seed, mem):
    layers = random_layers(seed)
    constraints = constraints_of(layers, mem, None)
    if not any(fits(layers, constraints, c) for c in between(layers)):
        return

    def loss(choices) -> float:
        return sum(share_lost(la, c) for la, c in zip(layers, choices, strict=True))

    result = baselines.balf(layers, constraints)
    cost = constraints[0].cost(layers, result)
    cheaper = [c for c in between(layers) if constraints[0].cost(layers, c) <= cost]
    assert loss(result) <= min(map(loss, cheaper)) + 1e-12


def limits(layers: Sequence[LayerCurves], limit: int) -> tuple[Constraint, ...]:
    total = sum(layer.costs["mem"] for layer in layers)
    return (Constraint("mem", limit / total, total, limit, 0),)


def test_uniform_never_keeps_a_layer_whole():
    # 8 of 10 ranks save something in the first layer, 4 of 10 in the second.
    layers = [layer_of([1.0] * 10, 10, 90), layer_of([1.0] * 10, 10, 50)]
    for limit, ranks in ((139, (8, 4)), (119, (7, 4)), (100, (6, 4)), (79, (3, 3)), (20, (1, 1))):
        found = baselines.uniform(layers, limits(layers, limit))
        assert found == (Choice(0, ranks[0]), Choice(0, ranks[1]))
    assert baselines.uniform(layers, limits(layers, 140)) == (None, None)


def test_equal_energy_keeps_whole_what_would_not_save_anything():
    # 0.9 of the energy needs 1 rank of the first layer and more than 2 of the second.
    layers = [layer_of([3, 0.5, 0.4, 0.3], 10, 35), layer_of([1, 1, 1, 1], 10, 25)]
    assert baselines.equal_energy(layers, limits(layers, 35)) == (Choice(0, 1), None)
    assert baselines.equal_energy(layers, limits(layers, 34)) == (Choice(0, 1), Choice(0, 2))


def test_greedy_counts_a_layer_above_its_candidates_as_whole():
    # The flat layer would give way last; its first drop above the candidates saves nothing.
    layers = [layer_of([2, 1, 0.1, 0.05], 10, 25), layer_of([1, 1, 1, 1], 10, 25)]
    assert baselines.greedy_energy_product(layers, limits(layers, 49)) == (Choice(0, 2), None)
    # Energies 4 of 5 and 3 of 4 per drop: the first layer goes to rank 1 before that.
    assert baselines.greedy_energy_product(layers, limits(layers, 44)) == (Choice(0, 1), None)
    found = baselines.greedy_energy_product(layers, limits(layers, 34))
    assert found == (Choice(0, 1), Choice(0, 2))


def test_alds_and_balf_on_a_case_worked_by_hand():
    # Relative norms after ranks 1, 2: 0.5, 0.1 and 0.9, 0.8.
    layers = [layer_of([1, 0.5, 0.1], 10, 25), layer_of([1, 0.9, 0.8], 10, 25)]
    assert baselines.alds(layers, limits(layers, 49)) == (Choice(0, 2), None)
    assert baselines.alds(layers, limits(layers, 44)) == (Choice(0, 1), None)
    assert baselines.alds(layers, limits(layers, 34)) == (Choice(0, 1), Choice(0, 2))
    # Shares lost at ranks 1, 2: 0.206, 0.008 and 0.592, 0.261; at once from 2 to whole.
    assert baselines.balf(layers, limits(layers, 49)) == (Choice(0, 2), None)
    assert baselines.balf(layers, limits(layers, 44)) == (Choice(0, 1), None)


@pytest.mark.parametrize("name", NAMES)
def test_layers_without_energy_do_no_harm(name):
    layers = [layer_of([0, 0, 0], 10, 25), layer_of([2, 1, 1], 10, 25)]
    constraints = limits(layers, 40)
    assert fits(layers, constraints, baselines.RULES[name](layers, constraints))


def test_a_layer_with_two_curves_is_refused():
    layer = layer_of([2, 1], 10, 25)
    double = LayerCurves("double", {"mem": 25}, layer.curves * 2)
    with pytest.raises(AssertionError, match="double: the rules are defined for one curve"):
        baselines.uniform([double], limits([double], 20))


def test_fixed_ranks():
    layers = [layer_of([1.0] * 6, 10, 45)] * 4
    assert baselines.fixed(layers, [0, 3, 4, 5]) == (
        Choice(0, 1), Choice(0, 3), Choice(0, 4), None,
    )  # fmt: skip
    gaps = rank_curve("matrix", np.ones(9), np.array([2, 4, 8]), 10, None)
    layers = [LayerCurves("gaps", {"mem": 85}, (gaps,))] * 3
    assert baselines.fixed(layers, [1, 5, 9]) == (Choice(0, 2), Choice(0, 8), None)


def planted(seed: int, rows: int, columns: int, rank: int, snr: float) -> np.ndarray:
    """Singular values of noise plus a matrix whose own are ``snr`` times the noise's edge."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((rows, rank)))[0] if rank else 0.0
    right = np.linalg.qr(generator.standard_normal((columns, rank)))[0].T if rank else 0.0
    edge = math.sqrt(rows) + math.sqrt(columns)
    signal = (left * np.linspace(snr, 2 * snr, rank) * edge) @ right if rank else 0.0
    noise = generator.standard_normal((rows, columns))
    return np.asarray(np.linalg.svd(0.37 * (signal + noise), compute_uv=False))


@pytest.mark.parametrize("shape", [(60, 60), (40, 100), (150, 50), (20, 300)])
@pytest.mark.parametrize("rank", [0, 1, 5, 9])
@pytest.mark.parametrize("method", ["vbmf_rank", "gavish_donoho_rank"])
def test_planted_ranks_are_found(method, rank, shape):
    rule = getattr(baselines, method)
    for seed in range(3):
        values = planted(seed, *shape, rank, 2.0)
        assert rule(values, *shape) == rank
        assert rule(values, *shape[::-1]) == rank
        # Neither rule depends on the scale.
        assert rule(values * 1e-6, *shape) == rank


@pytest.mark.parametrize("method", ["vbmf_rank", "gavish_donoho_rank"])
def test_exact_low_rank_and_degenerate_matrices(method):
    rule = getattr(baselines, method)
    assert rule(np.array([3.0, 2.0]), 8, 20) == 2
    assert rule(np.zeros(4), 4, 4) == 0
    assert rule(np.ones(5), 5, 9) == 0
    assert rule(np.ones(1), 1, 1) in (0, 1)


def gain(x: float, alpha: float, points: int) -> float:
    """What one component adds to the free energy, all but two of its parameters minimised out.

    The two, searched here, are the shares of the second moments of the factors' columns
    that are due to their means.
    """
    p, q = np.meshgrid(*[np.linspace(0, 1, points, endpoint=False)] * 2)
    return float((-np.log1p(-p) - alpha * np.log1p(-q) - x * p * q).min())


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.1, 0.02])
def test_threshold_of_vbmf_is_where_a_component_begins_to_pay(alpha):
    threshold = baselines._vbmf_threshold(alpha)
    assert gain(0.99 * threshold, alpha, 1000) == 0
    assert gain(1.01 * threshold, alpha, 1000) < -1e-4


@pytest.mark.parametrize(("seed", "snr"), [(0, 0.8), (1, 1.2), (2, 3.0)])
def test_the_noise_variance_has_the_least_free_energy(seed, snr):
    rows, columns = 20, 40
    squares = planted(seed, rows, columns, 3, snr) ** 2 / columns
    grid = np.geomspace(0.3 * squares.mean() / snr**2, 1.5 * squares.mean(), 80)
    energies = [
        sum(x + math.log(variance) + gain(x, rows / columns, 100) for x in squares / variance)
        for variance in grid
    ]
    found = baselines._noise_variance(squares, rows / columns, grid[0], grid[-1])
    assert found == pytest.approx(grid[np.argmin(energies)], rel=0.05)


def test_omega_of_gavish_and_donoho():
    assert baselines.gavish_donoho_omega(1.0) == pytest.approx(2.858, abs=5e-4)
    for beta in np.linspace(0.05, 1, 20).tolist():
        cubic = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert baselines.gavish_donoho_omega(beta) == pytest.approx(cubic, abs=0.03)
