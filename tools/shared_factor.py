"""What a shared first factor would gain for products that read the same tensor.

    python tools/shared_factor.py MODEL DATA [--samples 64] [--probe 32]

Query, key and value, for instance: factors of the stacked weights under their common moment, with
one first factor for all, take ``r (n + sum m_i)`` numbers where those of their own take
``sum r_i (n + m_i)``. For each share of the numbers of all products, the table has the least sum of
squared errors with separate factors and with the choice of shared ones for any part of each group,
for the groups alone and for all products. Every weight may also stay whole, and numbers go to where
they gain most. An error counts by what it changes at the model's last output of floating type: each
layer is measured alone, at the rank that first loses less than a twentieth.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import typer
from numpy.typing import NDArray

from cobla_onnx.allocation.bound import lower_hull
from cobla_onnx.calibration.data.dataset import input_specs
from cobla_onnx.calibration.data.readers import open_data
from cobla_onnx.calibration.statistics import Seen
from cobla_onnx.graph.layers import Layer, find_layers, read_weight
from cobla_onnx.graph.subgraph import expose
from cobla_onnx.pipeline.inputs import open_model
from cobla_onnx.runtime.session import Feeds, open_session
from cobla_onnx.variants.low_rank.from_data import layer_moment
from cobla_onnx.variants.low_rank.matricisation import schemes_for
from cobla_onnx.variants.low_rank.product_scheme import ProductScheme
from cobla_onnx.variants.low_rank.weighted_svd import WeightedFactorizer, inputs_first

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PROBED = 0.05
"""Most relative squared error of a layer when it is measured what its errors cost."""

Points: TypeAlias = "list[tuple[float, float]]"
"""Numbers that are stored, ascending, and the least error with them, descending."""


def hull(points: Points) -> Points:
    """Return the corners of the lower convex hull, as far as it falls."""
    falling: Points = []
    for x, y in sorted(points):
        if not falling or y < falling[-1][1]:
            falling.append((x, y))
    found = lower_hull(*np.transpose(falling))
    return list(zip(*(each.tolist() for each in found), strict=True))


def added(hulls: Sequence[Points]) -> Points:
    """Return the hull of the sums of a point of each: their edges, the steepest first."""
    start = np.sum([its[0] for its in hulls], axis=0)
    edges = [np.subtract(b, a) for its in hulls for a, b in pairwise(its)]
    edges.sort(key=lambda edge: float(edge[1] / edge[0]))
    return [(float(x), float(y)) for x, y in np.cumsum([start, *edges], axis=0)]


def partitions(items: Sequence[Any]) -> Iterator[list[list[Any]]]:
    """Yield all ways to put items into groups."""
    if not items:
        yield []
        return
    for groups in partitions(items[1:]):
        yield [[items[0]], *groups]
        for place, group in enumerate(groups):
            yield [*groups[:place], [items[0], *group], *groups[place + 1 :]]


@dataclass(frozen=True)
class Measured:
    """A product with its weight, inputs first, the moment of its inputs, and what errors cost."""

    data: str
    weight: NDArray[Any]
    second: NDArray[np.float64]
    price: float


def error_hull(members: Sequence[Measured]) -> Points:
    """Return the hull of products that share their first factor, or stay whole together."""
    weight = np.concatenate([each.weight for each in members], axis=1)
    prices = [np.full(each.weight.shape[1], each.price) for each in members]
    full, (rows, columns) = min(weight.shape), weight.shape
    scheme = ProductScheme("matrix", weight.shape, 1, False, True)
    solver = WeightedFactorizer(scheme, weight, members[0].second, full, np.concatenate(prices))
    errors = solver.errors(np.arange(full + 1))
    pairs: Points = [(rank * (rows + columns), float(e)) for rank, e in enumerate(errors)]
    return hull([(x, y) for x, y in pairs if x < weight.size] + [(weight.size, 0.0)])


def best_hull(members: Sequence[Measured]) -> Points:
    """Return the hull of products of which any may share a first factor."""
    ways = (added([error_hull(part) for part in parts]) for parts in partitions(members))
    return hull([point for way in ways for point in way])


def measure(model: onnx.ModelProto, data: Path, samples: int, probe: int) -> list[Measured]:
    """Measure all products with a matrix."""
    layers = [
        layer
        for layer in find_layers(model).layers
        if layer.op in ("MatMul", "Gemm") and len(layer.shape) == 2 and len(layer.uses) == 1
    ]
    with open_data(data, input_specs(model), samples=samples) as dataset:
        seen = Seen(model, layers, lambda: dataset.batches(range(len(dataset)), 8))
        step = max(1, len(dataset) // probe)
        feeds = list(dataset.batches(range(0, len(dataset), step), 8))
    layers = [layer for layer in layers if not seen.is_wide(layer)]
    expected = _outputs(model, layers, {}, feeds)
    scale = float(np.mean((expected - expected.mean(axis=0)) ** 2))
    found = []
    for layer in layers:
        weight = read_weight(model, layer)
        second = layer_moment(seen, layer, weight)
        scheme = schemes_for(layer)[0]
        solver = WeightedFactorizer(scheme, weight, second, min(layer.shape), None)
        errors = solver.errors(np.arange(min(layer.shape) + 1))
        rank = int(np.argmax(errors <= PROBED * solver.energy))
        first, last = (factor[0] for factor in inputs_first(scheme, solver.factorize(rank)))
        own = weight if scheme.inputs_first else weight.T
        changed = (first @ last if scheme.inputs_first else (first @ last).T).astype(weight.dtype)
        given = _outputs(model, layers, {layer.name: changed}, feeds)
        price = float(np.mean((given - expected) ** 2)) / scale / float(errors[rank])
        found.append(Measured(layer.uses[0].data, own, second, price))
        print(f"{layer.name}: {price * solver.energy:.3g}", file=sys.stderr)
    return found


def _outputs(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    changed: Mapping[str, NDArray[Any]],
    feeds: Sequence[Feeds],
) -> NDArray[np.float64]:
    """Return the last floating output of a model in which some layers have other weights."""
    its = [layer for layer in layers if layer.name in changed]
    exposed = expose(model, its, as_inputs=False)
    extra = {n: changed[layer.name] for n, layer in zip(exposed.weights, its, strict=True)}
    session = open_session(exposed.model, 1, [], extra, optimized=True)
    found = []
    for batch in feeds:
        floating = [each for each in session.run(None, batch) if each.dtype.kind == "f"]
        found.append(floating[-1].reshape(len(floating[-1]), -1).astype(np.float64))
    return np.concatenate(found)


def table(products: Sequence[Measured]) -> str:
    """Return a table in markdown of least errors by share of the numbers."""
    groups: dict[str, list[Measured]] = defaultdict(list)
    for each in products:
        groups[each.data].append(each)
    joint = [members for members in groups.values() if len(members) > 1]
    if not joint:
        return "No two products read the same tensor."
    rows = ["| | " + " | ".join(f"{share:g}" for share in SHARES) + " |"]
    rows.append("| --- |" + " --- |" * len(SHARES))
    for what, its in (("groups", joint), ("all products", list(groups.values()))):
        apart = added([error_hull([each]) for members in its for each in members])
        shared = added([best_hull(members) for members in its])
        at = [share * apart[-1][0] for share in SHARES]
        pairs = [np.interp(at, *np.transpose(points)) for points in (apart, shared)]
        for name, errors in zip(("separate", "shared where better"), pairs, strict=True):
            rows.append(f"| {what}, {name} | " + " | ".join(f"{e:.3g}" for e in errors) + " |")
        # The sums of both ways are rounded differently where nothing is gained.
        gains = np.maximum(1 - pairs[1] / pairs[0], 0.0)
        rows.append(f"| {what}, less by | " + " | ".join(f"{gain:.1%}" for gain in gains) + " |")
    return "\n".join(rows)


def main(model: Path, data: Path, samples: int = 64, probe: int = 32) -> None:
    """Print the table of a model."""
    print(table(measure(open_model(model), data, samples, probe)))


if __name__ == "__main__":
    typer.run(main)
