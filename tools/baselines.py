"""Published rules that choose ranks, to compare cobla-onnx with.

Written from the papers. All see the same curves and the same budgets as cobla-onnx. A rule
with a budget has one free number (a ratio, a share of energy, a tolerance, a multiplier),
which is set to the last value whose ranks fit; ranks that are left over are not filled, since
no paper does. Rules without a budget give a rank for a matrix, see `fixed`.

The rules are defined for one unfolding of a layer, so each `LayerCurves` must have one curve,
of which they read the singular values, the ranks and the costs. Whether the singular values
are those of the weight or of the response (whitened) is the caller's choice; the docstrings
say which the paper uses.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import brentq, minimize_scalar

from cobla_onnx.allocation import Choice, Constraint, LayerCurves, VariantCurve
from cobla_onnx.allocation.budget import unreachable
from cobla_onnx.allocation.problem import Float64

__all__ = [
    "RULES",
    "alds",
    "balf",
    "equal_energy",
    "fixed",
    "gavish_donoho_omega",
    "gavish_donoho_rank",
    "greedy_energy_product",
    "uniform",
    "vbmf_rank",
]

Choices: TypeAlias = tuple[Choice | None, ...]
Rule: TypeAlias = Callable[[Sequence[LayerCurves], Sequence[Constraint]], Choices]

# Points at which the noise variance's objective, which has local minima, is looked at first.
GRID = 256


def uniform(layers: Sequence[LayerCurves], constraints: Sequence[Constraint]) -> Choices:
    """Keep the same ratio of the full rank in every layer.

    Source: the usual control of the literature, for example the "constant per-layer
    compression ratios" of Liebenwein et al. (2021), Sec. 2.2; see `alds`.

    Ours: the ratio is that of ranks, rounded down to a candidate and at least the smallest.
    No layer is kept whole: a rank that saves nothing becomes the largest that does. At ratio
    1, when the whole model fits, all layers stay whole.

    Raises
    ------
    BudgetError
        If the smallest ranks do not fit.
    """
    steps = []
    for layer in layers:
        curve = _only(layer)
        steps.append(np.append(curve.levels[1:] / curve.most, 1.0))
    return _climb(layers, constraints, steps)


def equal_energy(layers: Sequence[LayerCurves], constraints: Sequence[Constraint]) -> Choices:
    """Keep the same share of energy, the sum of squared singular values, in every layer.

    Source: Li and Shi (2018), "Constrained Optimization Based Low-Rank Approximation of Deep
    Neural Networks": heuristic 0 of their published code, which starts their solver; the
    energy is that of the weight. A layer whose rank would not save anything is put back
    whole ("cost saturation" in their code).

    Ours: such layers count as whole while the share is sought, where their code puts them
    back in a second pass.

    Raises
    ------
    BudgetError
        If the smallest ranks do not fit.
    """
    steps = [-_lost(curve)[curve.levels] for curve in map(_only, layers)]
    return _climb(layers, constraints, steps)


def greedy_energy_product(
    layers: Sequence[LayerCurves], constraints: Sequence[Constraint]
) -> Choices:
    """Drop, again and again, the eigenvalue that loses least relative energy for its cost.

    Source: Zhang, Zou, He and Sun (2015), "Accelerating Very Deep Convolutional Networks for
    Classification and Detection", section "Rank Selection for Whole-Model Acceleration". It
    maximises the product over the layers of the kept PCA energy of the responses under a
    limit on time. From full rank, it drops the last eigenvalue of the layer with the least
    (relative decrease of energy) / (decrease of cost), until the limit is met. The energies
    are those of the responses, so pass curves of whitened weights to follow the paper.

    Ours: a unit of rank saves what it costs in both factors, where the paper takes the cost
    of the layer by its full rank. With two budgets, costs are added as fractions of their
    totals. The paper counts a layer of rank d' as d'/d of its cost, which is too little, and
    has no layers that stay whole; here a layer above its largest candidate rank counts, and
    stays, as whole. So its first drops save nothing in truth, though the greedy choice
    credits them; those that stay above the candidates have no effect. Between candidates that
    are not neighbours all eigenvalues are dropped at once.

    Raises
    ------
    BudgetError
        If the smallest ranks do not fit.
    """
    if _whole_fits(layers, constraints):
        return (None,) * len(layers)
    paths = [_drops(_only(layer), constraints) for layer in layers]
    totals = [c.cost(layers, (None,) * len(layers)) for c in constraints]
    choices: list[Choice | None] = [None] * len(layers)
    heap = [(path[0][0], index, 0) for index, path in enumerate(paths)]
    heapq.heapify(heap)
    while any(total > c.limit for total, c in zip(totals, constraints, strict=True)):
        _, index, number = heapq.heappop(heap)
        layer, rank = layers[index], paths[index][number][1]
        after = Choice(0, rank) if rank <= layer.curves[0].levels[-1] else None
        for k, c in enumerate(constraints):
            totals[k] += c.cost([layer], [after]) - c.cost([layer], [choices[index]])
        choices[index] = after
        if number + 1 < len(paths[index]):
            heapq.heappush(heap, (paths[index][number + 1][0], index, number + 1))
    return tuple(choices)


def alds(layers: Sequence[LayerCurves], constraints: Sequence[Constraint]) -> Choices:
    """Minimise the largest relative error in the operator norm over the layers.

    Source: Liebenwein, Maalouf, Gal, Feldman and Rus (2021), "Compressing Neural Networks:
    Towards Determining the Optimal Layer-wise Decomposition", Eq. (8) with the error of
    Theorem 1, s_{r+1} / s_1, of the weight. This is the global step, line 4 of Algorithm 1:
    guess the error, take the smallest ranks that keep within it, repeat until the size fits.

    Ours: the number of subspaces per layer is 1 throughout, so there is no local step
    (line 7) and nothing random. A layer stays whole, without error, if no candidate keeps
    within the error. The paper limits parameters; any budgets may be given here. For grouped
    layers the singular values are pooled over the groups, so s_1 is not quite the norm.

    Raises
    ------
    BudgetError
        If the smallest ranks do not fit.
    """
    steps = []
    for curve in map(_only, layers):
        values = np.append(_values(curve), 0.0)
        scale = values[0] if values[0] > 0 else 1.0
        steps.append(-values[curve.levels] / scale)
    return _climb(layers, constraints, steps)


def balf(layers: Sequence[LayerCurves], constraints: Sequence[Constraint]) -> Choices:
    """Maximise the sum over the layers of the share of energy kept, by one multiplier.

    Source: Gonzalez Martinez (2025), "BALF: Budgeted Activation-Aware Low-Rank Factorization
    for Fine-Tuning-Free Model Compression", arXiv 2509.25136: a knapsack with one choice per
    layer, relaxed by a Lagrange multiplier that is bisected; for a given multiplier each
    layer takes the least of loss + multiplier * cost, the cheapest of equals. A layer costs
    at most what it costs whole, and is whole there. The energy is that of the whitened
    weight, so pass whitened curves to follow the paper.

    Ours: bisection goes on until the multiplier is exact, where the authors' code takes 300
    steps. The paper has one budget; with two, the cost is the sum of both as fractions of
    their totals, and both must be met. After the bisection no further filling, as in theirs.

    Raises
    ------
    BudgetError
        If the smallest ranks do not fit.
    """
    if _whole_fits(layers, constraints):
        return (None,) * len(layers)
    losses, prices = [], []
    for layer in layers:
        curve = _only(layer)
        losses.append(np.append(_lost(curve)[curve.levels], 0.0))
        whole = sum(c.whole(layer) / c.total for c in constraints)
        prices.append(np.append(curve.levels * _price(curve, constraints), whole))

    def at(multiplier: float) -> Choices:
        pairs = zip(losses, prices, strict=True)
        return _chosen(layers, [int(np.argmin(e + multiplier * p)) for e, p in pairs])

    low, high = 0.0, 1.0
    if _fits(layers, constraints, at(low)):
        return at(low)
    while not _fits(layers, constraints, at(high)):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if _fits(layers, constraints, at(middle)):
            high = middle
        else:
            low = middle
    return at(high)


RULES: Mapping[str, Rule] = {
    "uniform": uniform,
    "equal-energy": equal_energy,
    "greedy-energy-product": greedy_energy_product,
    "alds": alds,
    "balf": balf,
}
"""The rules that meet a budget, by name."""


def vbmf_rank(singular_values: Float64, rows: int, columns: int) -> int:
    """Rank of a matrix by empirical variational Bayes, with the noise estimated.

    Source: Nakajima, Sugiyama, Babacan and Tomioka (2013), "Global analytic solution of
    fully-observed variational Bayesian matrix factorization", JMLR 14. The threshold on the
    singular values, the objective of the noise variance and its bounds are in the simpler
    form that the same authors derived in "Perfect Dimensionality Recovery by Variational
    Bayesian PCA" (NIPS 2012; "Condition for ...", JMLR 16, 2015). As a rule for ranks: Kim,
    Park, Yoo, Choi, Yang and Shin (2016), "Compression of Deep Convolutional Neural Networks
    for Fast and Low Power Mobile Applications", on the unfoldings of the weight.

    Ours: the theorem asks for the global minimum over the noise variance; a grid finds its
    neighbourhood before the bounded scalar minimisation. Ranks of one unfolding each, where
    Kim et al. decompose along two modes (Tucker-2).

    Parameters
    ----------
    singular_values : float64 array
        Descending; missing ones are taken to be 0.
    rows, columns : int
        Shape of the matrix.
    """
    small, large = min(rows, columns), max(rows, columns)
    squares = _padded(singular_values, small) ** 2 / large
    alpha = small / large
    threshold = _vbmf_threshold(alpha)
    # No more components than this can be told from noise, which bounds the variance below.
    most = math.ceil(small / (1 + alpha)) - 1
    low = max(squares[most] / threshold, float(squares[most:].mean()))
    high = float(squares.mean())
    if low <= 0:
        return int(np.count_nonzero(squares))
    variance = _noise_variance(squares, alpha, low, max(low, high))
    return int(np.count_nonzero(squares > threshold * variance))


def _vbmf_threshold(alpha: float) -> float:
    """Least squared value, over the longer side and the noise variance, of a component."""

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    tau = float(brentq(lambda t: phi(t) + phi(t / alpha), 2.5 * alpha, 2.6))
    return (1 + tau) * (1 + alpha / tau)


def _noise_variance(squares: Float64, alpha: float, low: float, high: float) -> float:
    """Variance of least free energy; ``squares`` are squared values over the longer side."""
    threshold = _vbmf_threshold(alpha)

    def energy(log_variance: float) -> float:
        # The logarithms of the squares are constant, and left out: they may be infinite.
        x = squares * math.exp(-log_variance)
        signal = x[x > threshold] - (1 + alpha)
        t = (signal + np.sqrt(np.maximum(signal**2 - 4 * alpha, 0.0))) / 2
        gain = np.log1p(t) + alpha * np.log1p(t / alpha) - t
        return float(x.sum() + len(x) * log_variance + gain.sum())

    grid = np.linspace(math.log(low), math.log(high), GRID)
    best = int(np.argmin([energy(point) for point in grid]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)]
    if not left < right:
        return low
    found = minimize_scalar(
        energy, bounds=(left, right), method="bounded", options={"xatol": 1e-10}
    )
    return math.exp(found.x if found.fun <= energy(grid[best]) else grid[best])


def gavish_donoho_rank(singular_values: Float64, rows: int, columns: int) -> int:
    """Rank of a matrix by the optimal hard threshold for unknown noise.

    Source: Gavish and Donoho (2014), "The Optimal Hard Threshold for Singular Values is
    4/sqrt(3)", IEEE Transactions on Information Theory 60(8): values above omega(beta) times
    the median singular value are kept, beta the shorter side by the longer.

    Ours: nothing but its use as a rule for ranks. omega is exact, see `gavish_donoho_omega`.

    Parameters
    ----------
    singular_values : float64 array
        Descending; missing ones are taken to be 0.
    rows, columns : int
        Shape of the matrix.
    """
    values = _padded(singular_values, min(rows, columns))
    omega = gavish_donoho_omega(min(rows, columns) / max(rows, columns))
    return int(np.count_nonzero(values > omega * np.median(values)))


@functools.cache
def gavish_donoho_omega(beta: float) -> float:
    """Factor on the median singular value: lambda*(beta) / sqrt(mu_beta).

    lambda* is the threshold for known noise, mu_beta the median of the Marchenko-Pastur law,
    here by quadrature over t = 1 + beta + 2 sqrt(beta) cos(angle). The paper also gives a
    cubic in beta that approximates the factor.

    >>> round(gavish_donoho_omega(1.0), 3)
    2.858
    """
    known = 2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))

    def point(angle: float) -> float:
        return 1 + beta + 2 * math.sqrt(beta) * math.cos(angle)

    def below(angle: float) -> float:
        if angle >= math.pi:
            # Nothing is left; older scipy divides by the zero at this end.
            return 0.0
        return float(quad(lambda a: 2 / math.pi * math.sin(a) ** 2 / point(a), angle, math.pi)[0])

    median = point(float(brentq(lambda angle: below(angle) - 0.5, 0.0, math.pi)))
    return math.sqrt(known / median)


def fixed(layers: Sequence[LayerCurves], ranks: Sequence[int]) -> Choices:
    """Choices of given ranks, without a budget.

    A rank becomes the next candidate from it upward, so 0 becomes the smallest; above the
    largest candidate the layer stays whole, since nothing would be saved.
    """
    pairs = zip(layers, ranks, strict=True)
    return _chosen(layers, [int(np.searchsorted(_only(la).levels, r)) for la, r in pairs])


def _only(layer: LayerCurves) -> VariantCurve:
    """Return the one curve of a layer."""
    assert len(layer.curves) == 1, f"{layer.name}: the rules are defined for one curve per layer"
    return layer.curves[0]


def _values(curve: VariantCurve) -> Float64:
    assert curve.spectrum is not None
    return curve.spectrum


def _lost(curve: VariantCurve) -> Float64:
    """Share of the energy that is lost at ranks 0 to full; summed from the small end."""
    squares = np.append(_values(curve) ** 2, 0.0)
    lost = np.cumsum(squares[::-1])[::-1]
    return np.asarray(lost / lost[0] if lost[0] > 0 else lost)


def _price(curve: VariantCurve, constraints: Sequence[Constraint]) -> float:
    """Cost of a unit of rank: the sum over the budgets of its fraction of the total."""
    return sum(curve.per_level[c.name] / c.total for c in constraints)


def _padded(values: Float64, length: int) -> Float64:
    assert len(values) <= length, "more singular values than the shorter side of the matrix"
    return np.pad(np.asarray(values, dtype=np.float64), (0, length - len(values)))


def _chosen(layers: Sequence[LayerCurves], indices: Sequence[int]) -> Choices:
    """Turn positions among the candidates into choices; one past the last is whole."""
    return tuple(
        Choice(0, int(curve.levels[index])) if index < len(curve.levels) else None
        for curve, index in zip(map(_only, layers), indices, strict=True)
    )


def _fits(
    layers: Sequence[LayerCurves], constraints: Sequence[Constraint], choices: Choices
) -> bool:
    return all(c.cost(layers, choices) <= c.limit for c in constraints)


def _whole_fits(layers: Sequence[LayerCurves], constraints: Sequence[Constraint]) -> bool:
    """Whether nothing has to be done; raises BudgetError where nothing can be done."""
    smallest = _chosen(layers, [0] * len(layers))
    least = {c.name: c.cost(layers, smallest) for c in constraints}
    beyond = {c.name: least[c.name] for c in constraints if least[c.name] > c.limit}
    if beyond:
        raise unreachable(constraints, beyond)
    return _fits(layers, constraints, (None,) * len(layers))


def _climb(
    layers: Sequence[LayerCurves], constraints: Sequence[Constraint], steps: Sequence[Float64]
) -> Choices:
    """Raise one level in all layers for as long as the limits hold, and no further.

    ``steps[i][k]``, ascending in k, is the level from which layer i leaves its candidate k
    for the next, the last for whole. The result changes nowhere else, so the bisection runs
    over these levels, and is exact.
    """
    if _whole_fits(layers, constraints):
        return (None,) * len(layers)
    levels = np.unique(np.concatenate([[-np.inf], *steps]))

    def at(number: int) -> Choices:
        return _chosen(
            layers, [int(np.searchsorted(one, levels[number], side="right")) for one in steps]
        )

    def exceeds(number: int) -> bool:
        return not _fits(layers, constraints, at(number))

    return at(bisect.bisect_left(range(len(levels)), True, key=exceeds) - 1)


def _drops(curve: VariantCurve, constraints: Sequence[Constraint]) -> list[tuple[float, int]]:
    """Ranks of a layer downward, each with (relative energy lost) / (cost saved) to get there."""
    full, largest = curve.most, int(curve.levels[-1])
    after: NDArray[np.int64] = np.append(np.arange(full - 1, largest, -1), curve.levels[::-1])
    before = np.append(full, after[:-1])
    squares = _values(curve) ** 2
    kept = np.append(0.0, np.cumsum(squares))[before]
    tail = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    decrease = (tail[after] - tail[before]) / np.where(kept > 0, kept, 1.0)
    saved = np.maximum(before - after, 1) * _price(curve, constraints)
    return list(zip((decrease / saved).tolist(), after.tolist(), strict=True))
