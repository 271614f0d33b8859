"""Group the masks of all layers into blocks, one variable each, for the relaxed problem.

Keep-whole. Under its active scheme, each mask of a layer up to the tangent rank r_t costs one
unit of rank. All singular values beyond r_t share one mask, whose cost is the difference to
the whole layer. r_t is where the line from the whole layer touches the convex curve of loss
against cost, so between r_t and whole no rank is worth its price. With all masks at 1 the cost
is exactly that of the whole layer: the authors' second pass for "cost saturation" becomes part
of one linear problem.

Blocks. Neighbouring singular values share a mask. Blocks that the knapsack's prices already
decide are frozen; a second round freezes those that reached a bound and splits the others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.allocation.budget import Constraint
from cobla_onnx.allocation.objective import Masks
from cobla_onnx.allocation.problem import Choice, Float64, LayerCurves, LossCurves

__all__ = ["Blocks", "Space", "active_schemes", "partition", "refine", "warm_masks"]

# A block is kept if its gain is this many times its price, dropped if it is this many times less.
CERTAIN_KEEP, CERTAIN_DROP = 100.0, 8.0


@dataclass
class Blocks:
    """A partition of all masks into blocks of neighbours, over all layers in a row.

    ``starts`` is the first mask of each block, ``costs`` (constraints, blocks) the cost of
    each block as a fraction of the room that each budget leaves, and ``curvature`` that of
    the separable model.
    """

    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    costs: Float64
    curvature: Float64
    divisible: NDArray[np.bool_]
    free: NDArray[np.bool_]


class Space:
    """The masks of all layers as one vector, with their costs and gains.

    ``gains`` is the loss that each singular value saves in the separable model. ``costs``
    (constraints, masks) are the costs of the masks and ``offset`` (constraints,) the cost of two
    factors at any rank, both as fractions of the room that a budget leaves. ``grid`` marks the
    masks at which a block may begin, so that blocks are made of candidate ranks.
    """

    def __init__(
        self,
        layers: Sequence[LayerCurves],
        losses: LossCurves,
        constraints: Sequence[Constraint],
        schemes: Sequence[int],
        tails: Sequence[int],
    ) -> None:
        self.schemes = tuple(schemes)
        self.gains = np.concatenate([-np.diff(losses[i][s]) for i, s in enumerate(schemes)])
        curves = [layer.curves[s] for layer, s in zip(layers, schemes, strict=True)]
        self.lengths = np.array([c.most for c in curves])
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        costs = np.zeros((len(constraints), self.offsets[-1]))
        offset = np.zeros(len(constraints))
        grid = np.zeros(self.offsets[-1], dtype=bool)
        for curve, start in zip(curves, self.offsets[:-1], strict=True):
            inside = curve.levels[curve.levels < curve.most]
            grid[start + np.append(0, inside)] = True
        for k, constraint in enumerate(constraints):
            room = max(constraint.limit - constraint.fixed, 1)
            for i, (layer, curve) in enumerate(zip(layers, curves, strict=True)):
                start, end = self.offsets[i], self.offsets[i + 1]
                path, tail = constraint.path(curve), tails[i]
                offset[k] += path[0] / room
                costs[k, start : start + tail] = np.diff(path[: tail + 1]) / room
                rest = (constraint.whole(layer) - path[tail]) / room
                costs[k, start + tail : end] = rest / max(end - start - tail, 1)
        self.costs, self.offset = costs, offset
        self.grid = grid

    def masks(self, flat: Float64, starts: NDArray[np.int64]) -> Masks:
        """Split the vector by layer; `starts` are the first masks of all blocks."""
        own = np.split(starts, np.searchsorted(starts, self.offsets[1:-1]))
        edges = [
            np.append(blocks - offset, length)
            for blocks, offset, length in zip(own, self.offsets, self.lengths, strict=False)
        ]
        return Masks(self.schemes, tuple(np.split(flat, self.offsets[1:-1])), tuple(edges))


def active_schemes(
    layers: Sequence[LayerCurves],
    losses: LossCurves,
    constraints: Sequence[Constraint],
    start: Sequence[Choice | None],
    weights: Float64,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the scheme to relax for each layer and its tangent rank."""
    schemes, tails = [], []
    for index, (layer, choice) in enumerate(zip(layers, start, strict=True)):
        rooms = [max(c.limit - c.fixed, 1) for c in constraints]
        shares = weights / rooms
        whole = shares @ [c.whole(layer) for c in constraints]
        best, tangents = [], []
        for number, curve in enumerate(layer.curves):
            ranks = np.append(0, curve.levels)
            cost = shares @ np.stack([c.path(curve)[ranks] for c in constraints])
            loss = np.asarray(losses[index][number])[ranks]
            best.append(float((loss + cost).min()))
            missing = whole - cost
            steep = np.where(missing > 0, loss / np.where(missing > 0, missing, 1.0), np.inf)
            tangents.append(int(ranks[np.argmin(steep)]))
        # Of a whole layer, masks can move on curves with nested levels alone.
        nested = np.array([curve.nested for curve in layer.curves])
        movable = np.where(nested | ~nested.any(), best, np.inf)
        scheme = int(np.argmin(movable)) if choice is None else choice.curve
        schemes.append(scheme)
        # Levels that do not contain each other stay: what is dropped begins right behind.
        stays = choice is not None and not layer.curves[scheme].nested
        tails.append(choice.level if choice is not None and stays else tangents[scheme])
    return tuple(schemes), tuple(tails)


def warm_masks(space: Space, choices: Sequence[Choice | None]) -> Float64:
    """Convert choices to one vector of masks."""
    flat = np.ones(space.offsets[-1])
    for i, choice in enumerate(choices):
        if choice is not None:
            flat[space.offsets[i] + choice.level : space.offsets[i + 1]] = 0.0
    return flat


def partition(
    space: Space,
    tails: Sequence[int],
    weights: Float64,
    flat: Float64,
    max_variables: int,
    fixed: Collection[int] = (),
) -> Blocks:
    """Cut each layer's masks into blocks; freeze those that gain and price already decide.

    The rank of the start is one of the cuts, so that blocks can express it.
    """
    gains = space.gains
    price = weights @ space.costs
    each = max(2, (max_variables - len(tails)) // max(len(tails), 1))
    starts: list[int] = []
    divisible: list[bool] = []
    for i, tail in enumerate(tails):
        begin, end = int(space.offsets[i]), int(space.offsets[i + 1])
        sure = gains[begin : begin + tail] > CERTAIN_KEEP * price[begin : begin + tail]
        none = gains[begin : begin + tail] * CERTAIN_DROP < price[begin : begin + tail]
        low = int(np.argmin(sure)) if tail and not sure.all() else tail
        high = max(low, tail - int(np.argmin(none[::-1])) if tail and not none.all() else low)
        cuts = _nearest(np.flatnonzero(space.grid[begin:end]), np.linspace(low, high, each + 1))
        rank = min(int(flat[begin:end].sum()), tail)
        edges = sorted({0, *cuts[cuts <= tail].tolist(), rank, tail} - {end - begin})
        starts.extend(begin + e for e in edges)
        divisible.extend(e < tail for e in edges)
    blocks = _with_costs(space, np.array(starts), np.array(divisible))
    gain = np.add.reduceat(gains, blocks.starts)
    cost = np.add.reduceat(price, blocks.starts)
    kept, dropped = gain > CERTAIN_KEEP * cost, gain * CERTAIN_DROP < cost
    mean = np.add.reduceat(flat, blocks.starts) / blocks.sizes
    # Freeze only what the warm start agrees with: it is feasible, and must stay the start.
    layer = np.searchsorted(space.offsets, blocks.starts, side="right") - 1
    still = np.isin(layer, list(fixed)) | (kept & (mean == 1.0)) | (dropped & (mean == 0.0))
    blocks.free = ~still
    return blocks


def _nearest(grid: NDArray[np.int64], wanted: Float64) -> NDArray[np.int64]:
    """Round to the nearest entries of an ascending grid, without duplicates."""
    right = np.clip(np.searchsorted(grid, wanted), 1, max(len(grid) - 1, 1))
    left, right = grid[right - 1], grid[np.minimum(right, len(grid) - 1)]
    return np.unique(np.where(wanted - left < right - wanted, left, right))


def _middle(grid: NDArray[np.bool_], start: int, size: int) -> NDArray[np.int64]:
    """Where to split a block: the grid point nearest to its middle, if there is one."""
    inside = np.flatnonzero(grid[start + 1 : start + size]) + start + 1
    return inside[np.argsort(np.abs(inside - (start + size // 2)), kind="stable")[:1]]


def _with_costs(space: Space, starts: NDArray[np.int64], divisible: NDArray[np.bool_]) -> Blocks:
    sizes = np.diff(np.append(starts, space.offsets[-1]))
    costs = np.add.reduceat(space.costs, starts, axis=1)
    curvature = 2.0 * np.add.reduceat(space.gains, starts)
    return Blocks(starts, sizes, costs, curvature, divisible, np.ones(len(starts), dtype=bool))


def refine(space: Space, blocks: Blocks, flat: Float64, max_variables: int) -> Blocks:
    """Freeze the blocks that reached a bound, and halve the widest of the others."""
    mean = np.add.reduceat(flat, blocks.starts) / blocks.sizes
    open_ = (mean > 1e-3) & (mean < 1 - 1e-3)
    order = np.argsort(-blocks.sizes * (open_ & blocks.divisible), kind="stable")
    spare = max(0, max_variables - int(open_.sum()))
    split = [b for b in order[:spare] if open_[b] and blocks.divisible[b] and blocks.sizes[b] > 1]
    halves = np.array(
        [
            middle
            for start, size in zip(blocks.starts[split], blocks.sizes[split], strict=True)
            for middle in _middle(space.grid, start, size)
        ],
        dtype=np.int64,
    )
    starts = np.concatenate([blocks.starts, halves])
    order = np.argsort(starts, kind="stable")
    divisible = np.concatenate([blocks.divisible, np.ones(len(halves), dtype=bool)])[order]
    free = np.concatenate([open_, np.ones(len(halves), dtype=bool)])[order]
    result = _with_costs(space, starts[order], divisible)
    result.free = free
    return result
