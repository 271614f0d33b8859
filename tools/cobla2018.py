"""COBLA as its authors published it, to compare cobla-onnx with.

Li and Shi, Constrained Optimization Based Low-Rank Approximation of Deep Neural Networks,
ECCV 2018, LNCS 11214, and what their code adds to the paper.

Faithful: the basis is the plain SVD of the weights; one scheme (``channel``) for all layers;
masks on singular values cost a unit of rank each, so that a layer can cost more than it did;
the loss is that of the network, minimised over relaxed masks by SQP with BFGS (scipy's
SLSQP, variables as they are) from a greedy start (the product of energies, Zhang et al.
2015); a second pass for "cost saturation" puts layers back whole whose factors cost more;
rounding is "add and SVD": the weight at the relaxed masks is factorised again, with the sum
of the masks as rank, its fraction drawn at random, the best of ten draws.

Not so: the loss is the divergence from the original's outputs, as everywhere here, and not
the cross-entropy to labels; neighbouring singular values share a mask, so that about 120 are
free; budgets are hard (theirs may be overstepped by 1 %); and draws are scored on held-back
calibration samples (theirs on the test set). Their hand-set windows for VGG-16 and their
fine-tuning are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import baselines
import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.optimize import minimize

from cobla_onnx.allocation import Choice, Constraint, LayerCurves, Masks, WeightError
from cobla_onnx.calibration.evaluation.gradients import GradientProbe
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.errors import BudgetError
from cobla_onnx.graph.layers import read_bias, read_weight
from cobla_onnx.pipeline.analysis import Analysis
from cobla_onnx.pipeline.search.network_loss import LossPath, NetworkLoss
from cobla_onnx.variants.low_rank.approximation import LowRankWeight
from cobla_onnx.variants.low_rank.nodes import make_replacement
from cobla_onnx.variants.low_rank.svd import Factorization, factorize
from cobla_onnx.variants.replacement import Replacement

__all__ = ["Cobla2018"]

FREE_MASKS = 120
ITERATIONS = 20
DRAWS = 10


@dataclass
class Cobla2018:
    """Compress by the method of 2018.

    Parameters
    ----------
    model : ModelProto
    analysis : Analysis
        By the weights alone, with the one scheme.
    calibration : Probe
        On the samples that the loss is made of.
    selection : Probe
        On the samples that the draws are scored on.
    threads : int
    seed : int
        Of the draws.
    """

    model: onnx.ModelProto
    analysis: Analysis
    calibration: Probe
    selection: Probe
    threads: int
    seed: int = 0

    def __post_init__(self) -> None:
        layers = self.analysis.layers
        whole = [(read_weight(self.model, x), read_bias(self.model, x)) for x in layers]
        self._loss = NetworkLoss(
            self.analysis.curves,
            LossPath(whole, self._approximate),
            GradientProbe(self.calibration, self.threads),
            WeightError(self.analysis.curves),
        )

    def compress(self, constraints: Sequence[Constraint]) -> list[Replacement]:
        """Return the factors that fit the constraints.

        Raises
        ------
        BudgetError
            If the constraints cannot be met.
        """
        curves = self.analysis.curves
        start = baselines.greedy_energy_product(curves, constraints)
        if not any(start):
            return []
        kept: set[int] = set()
        masks = self._relax(constraints, start, kept)
        saturated = {
            i
            for i, (layer, mask) in enumerate(zip(curves, masks.values, strict=True))
            if any(
                mask.sum() * layer.curves[0].per_level[c.name] >= c.whole(layer)
                for c in constraints
            )
        }
        if saturated:
            masks = self._relax(constraints, _without(start, saturated), saturated)
            kept = saturated
        return self._round(constraints, masks, kept)

    def _relax(
        self, constraints: Sequence[Constraint], start: Sequence[Choice | None], kept: set[int]
    ) -> Masks:
        """Solve the relaxed problem; layers in `kept` are whole and cost what they did."""
        curves = self.analysis.curves
        cuts = [
            _cuts(layer, choice, len(curves)) for layer, choice in zip(curves, start, strict=True)
        ]
        first = np.concatenate([[0], np.cumsum([len(c) - 1 for c in cuts])])
        free = np.concatenate([np.full(len(c) - 1, i not in kept) for i, c in enumerate(cuts)])
        sizes = np.concatenate([np.diff(c) for c in cuts])
        x = np.concatenate([_levels(c, choice) for c, choice in zip(cuts, start, strict=True)])
        costs, rooms = _costs(curves, constraints, sizes, first, kept)
        x = _within(x, free, costs, rooms)

        def expand(values: NDArray[np.float64]) -> Masks:
            full = np.where(free, 0.0, 1.0)
            full[free] = np.clip(values, 0.0, 1.0)
            parts = np.split(full, first[1:-1])
            spread = tuple(np.repeat(p, np.diff(c)) for p, c in zip(parts, cuts, strict=True))
            return Masks((0,) * len(cuts), spread, tuple(cuts))

        def slope(values: NDArray[np.float64]) -> NDArray[np.float64]:
            by_layer = self._loss.gradient(expand(values))
            sums = [np.add.reduceat(g, c[:-1]) for g, c in zip(by_layer, cuts, strict=True)]
            return np.asarray(np.concatenate(sums)[free] / scale)

        scale = max(self._loss.value(expand(x[free])), 1e-12)
        result = minimize(
            lambda values: self._loss.value(expand(values)) / scale,
            x[free],
            jac=slope,
            method="SLSQP",
            bounds=[(0.0, 1.0)] * int(free.sum()),
            constraints={
                "type": "ineq",
                "fun": lambda values: (rooms - costs[:, free] @ values) / rooms,
                "jac": lambda values: -costs[:, free] / rooms[:, None],
            },
            options={"maxiter": ITERATIONS, "ftol": 1e-4},
        )
        # Unscaled, SLSQP may end above its start, or nowhere.
        found = result.x if result.fun <= 1.0 else x[free]
        return expand(_within_free(found, costs[:, free], rooms))

    def _round(
        self, constraints: Sequence[Constraint], masks: Masks, kept: set[int]
    ) -> list[Replacement]:
        """Add and SVD: factorise the relaxed weights, the best of ten draws of the ranks."""
        generator = np.random.default_rng(self.seed)
        relaxed = self._loss.weights(masks)
        sums = np.array([mask.sum() for mask in masks.values])
        best: tuple[float, list[tuple[int, Factorization]]] | None = None
        for draw in range(DRAWS + 1):
            up = generator.random(len(sums)) < sums % 1 if draw else np.zeros(len(sums), bool)
            ranks = np.maximum(np.floor(sums + 1e-9) + up, 1).astype(int)
            choices = [None if i in kept else Choice(0, int(r)) for i, r in enumerate(ranks)]
            if any(c.cost(self.analysis.curves, choices) > c.limit for c in constraints):
                continue
            made = self._factorised(choices, relaxed)
            weights = {i: (self._dense(i, factors), None) for i, factors in made}
            loss = self.selection.loss(weights)
            if best is None or loss < best[0]:
                best = loss, made
        if best is None:
            raise BudgetError("the method of 2018 finds no ranks within the budget")
        return [
            make_replacement(self.analysis.layers[i], self.analysis.forms[i][0], factors)
            for i, factors in best[1]
        ]

    def _factorised(
        self, choices: Sequence[Choice | None], relaxed: dict[int, Any]
    ) -> list[tuple[int, Factorization]]:
        made = []
        for index, choice in enumerate(choices):
            if choice is not None:
                weight = relaxed.get(index, self._loss.path.whole[index])[0]
                matrix = self.analysis.forms[index][0].matrix(weight)
                made.append((index, factorize(matrix, min(choice.level, *matrix.shape[1:]))))
        return made

    def _dense(self, index: int, factors: Factorization) -> NDArray[Any]:
        return self.analysis.forms[index][0].weight(factors.left @ factors.right)

    def _approximate(self, layer: int, curve: int, ranks: Sequence[int]) -> list[LowRankWeight]:
        weight, bias = self._loss.path.whole[layer]
        whole = factorize(self.analysis.forms[layer][curve].matrix(weight), max(ranks))
        found = []
        for rank in ranks:
            factors = Factorization(
                whole.left[:, :, :rank],
                whole.singular_values[:, :rank],
                whole.right[:, :rank],
            )
            # None would say that the layer has no bias, and the search would run without it.
            found.append(LowRankWeight(self.analysis.forms[layer][curve], factors, bias))
        return found


def _without(start: Sequence[Choice | None], kept: set[int]) -> list[Choice | None]:
    return [None if i in kept else choice for i, choice in enumerate(start)]


def _cuts(layer: LayerCurves, choice: Choice | None, layers: int) -> NDArray[np.int64]:
    """Edges of the blocks of a layer's masks, finer for small ranks, and at its start."""
    full_rank = layer.curves[0].most
    count = max(2, FREE_MASKS // layers)
    edges = np.geomspace(1, full_rank, count).round().astype(np.int64)
    own = [] if choice is None else [choice.level]
    return np.unique(np.concatenate([[0], edges, own]).astype(np.int64))


def _levels(cuts: NDArray[np.int64], choice: Choice | None) -> NDArray[np.float64]:
    return np.ones(len(cuts) - 1) if choice is None else (cuts[1:] <= choice.level).astype(float)


def _costs(
    curves: Sequence[LayerCurves],
    constraints: Sequence[Constraint],
    sizes: NDArray[np.int64],
    first: NDArray[np.int64],
    kept: set[int],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cost of each block under each constraint, and the room that is left to all."""
    costs = np.zeros((len(constraints), len(sizes)))
    rooms = np.zeros(len(constraints))
    for k, constraint in enumerate(constraints):
        rooms[k] = constraint.limit - constraint.fixed
        for i, layer in enumerate(curves):
            if i in kept:
                rooms[k] -= constraint.whole(layer)
            else:
                block = slice(first[i], first[i + 1])
                costs[k, block] = sizes[block] * layer.curves[0].per_level[constraint.name]
    if (rooms <= 0).any():
        raise BudgetError("the layers that the method of 2018 keeps whole exceed the budget")
    return costs, rooms


def _within(
    x: NDArray[np.float64],
    free: NDArray[np.bool_],
    costs: NDArray[np.float64],
    rooms: NDArray[np.float64],
) -> NDArray[np.float64]:
    result = x.copy()
    result[free] = _within_free(x[free], costs[:, free], rooms)
    return result


def _within_free(
    x: NDArray[np.float64], costs: NDArray[np.float64], rooms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Scale masks down until the relaxed costs hold: layers that were whole cost more now."""
    x = np.clip(x, 0.0, 1.0)
    share: float = min(1.0, float((rooms / np.maximum(costs @ x, 1e-12)).min()))
    return x * share
