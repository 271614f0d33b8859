"""What an output error of one layer costs the network: the scale between layers.

Layers are truncated one at a time and the loss of the whole network is measured on a few
dozen samples. A handful of ranks under one scheme give each layer's response, loss against
squared relative output error, which is close to a power law; the error curves of all its
schemes are read through it. Points that an allocation chooses are measured themselves, and
correct the response of their own curve.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cobla_onnx.allocation import Choice, Constraint, LayerCurves, OutputError
from cobla_onnx.calibration.probe import Probe
from cobla_onnx.calibration.seen import Seen
from cobla_onnx.graph.layers import Layer
from cobla_onnx.lowrank.factorize import Float64
from cobla_onnx.lowrank.schemes import Scheme

__all__ = ["Response", "Sensitivity"]

# Squared relative output errors at which every layer is measured.
TARGETS = (0.03, 0.1, 0.3)
# Losses and errors below these are rounding.
LEAST_LOSS = 1e-8
LEAST_ERROR = 1e-9
# Logarithm of the largest loss told apart: two close points extrapolate beyond any float.
MOST_LOG = 500.0


@dataclass
class Response:
    """Loss of the network against the squared relative output error of one layer.

    Interpolated between measured points in logarithms; proportional to the error below
    them, and beyond them at least proportional.
    """

    points: dict[float, float] = field(default_factory=dict)

    def add(self, error: float, loss: float) -> None:
        """Add a measured point."""
        self.points[max(error, LEAST_ERROR)] = max(loss, LEAST_LOSS)

    def logarithms(self) -> tuple[Float64, Float64]:
        """Measured points in logarithms, ascending, losses never falling."""
        errors = np.array(sorted(self.points))
        losses = np.array([self.points[error] for error in errors])
        return np.log(errors), np.maximum.accumulate(np.log(losses))

    def __call__(self, errors: Float64) -> Float64:
        """Loss at the given errors; 0 at 0."""
        known, losses = self.logarithms()
        wanted = np.log(np.maximum(errors, LEAST_ERROR))
        result = np.interp(wanted, known, losses)
        slope = 1.0
        if len(known) > 1:
            slope = max(1.0, float((losses[-1] - losses[0]) / (known[-1] - known[0])))
        result = result + np.minimum(wanted - known[0], 0.0)
        result = result + slope * np.maximum(wanted - known[-1], 0.0)
        return np.where(errors > LEAST_ERROR, np.exp(np.minimum(result, MOST_LOG)), 0.0)


class Sensitivity:
    """Measures and keeps the responses of all layers.

    Parameters
    ----------
    layers, curves, schemes : sequences, one entry for each layer
    seen : Seen
    probe : Probe
        On samples of the calibration split.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        curves: Sequence[LayerCurves],
        schemes: Sequence[Sequence[Scheme]],
        seen: Seen,
        probe: Probe,
    ) -> None:
        self._layers, self._curves, self._schemes = layers, curves, schemes
        self._seen, self._probe = seen, probe
        self._floor = probe.loss({})
        self.responses = [Response() for _ in layers]
        self._own: dict[tuple[int, int], Response] = {}

    def copy(self) -> Sensitivity:
        """Return what was measured so far, to be refined on its own."""
        result = copy.copy(self)
        result.responses = [Response(dict(r.points)) for r in self.responses]
        result._own = {key: Response(dict(r.points)) for key, r in self._own.items()}
        return result

    def measure(
        self,
        constraints: Sequence[Constraint],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Measure every layer under the scheme that is cheapest under the constraints."""
        for index, layer in enumerate(self._curves):
            progress(index, len(self._curves))
            chosen = min(range(len(layer.curves)), key=lambda k: _price(layer, k, constraints))
            ranks = sorted({_rank_at(layer, chosen, target) for target in TARGETS})
            for rank, loss in zip(ranks, self._losses(index, chosen, ranks), strict=True):
                error = float(layer.curves[chosen].relative_errors()[rank])
                self.responses[index].add(error, loss)
                self._own.setdefault((index, chosen), Response()).add(error, loss)
        progress(len(self._curves), len(self._curves))

    def refine(self, choices: Sequence[Choice | None]) -> bool:
        """Measure the chosen points themselves; tell whether any of them was new."""
        new = False
        for index, choice in enumerate(choices):
            if choice is None:
                continue
            own = self._own.setdefault((index, choice.curve), Response())
            error = float(self._curves[index].curves[choice.curve].relative_errors()[choice.rank])
            if max(error, LEAST_ERROR) in own.points:
                continue
            own.add(error, self._losses(index, choice.curve, [choice.rank])[0])
            new = True
        return new

    def objective(self) -> OutputError:
        """Return the separable loss that the measurements so far amount to."""
        return OutputError(
            [
                [self._curve(index, number) for number in range(len(layer.curves))]
                for index, layer in enumerate(self._curves)
            ]
        )

    def _curve(self, index: int, number: int) -> Float64:
        errors = self._curves[index].curves[number].relative_errors()
        response = self.responses[index]
        losses = response(errors)
        own = self._own.get((index, number))
        if own is not None:
            known, measured = own.logarithms()
            ratios = measured - np.log(np.maximum(response(np.exp(known)), LEAST_LOSS))
            wanted = np.log(np.maximum(errors, LEAST_ERROR))
            losses = losses * np.exp(np.interp(wanted, known, ratios))
        # Less error is never worse; errors fall with the rank.
        return np.minimum.accumulate(losses)

    def _losses(self, index: int, number: int, ranks: Sequence[int]) -> list[float]:
        scheme = self._schemes[index][number]
        found = self._seen.approximate(self._layers[index], scheme, ranks)
        losses = [self._probe.loss({index: (a.weight, a.bias)}) for a in found]
        return [max(loss - self._floor, 0.0) for loss in losses]


def _rank_at(layer: LayerCurves, number: int, error: float) -> int:
    """Least candidate rank whose error is at most `error`, or the largest."""
    curve = layer.curves[number]
    reached = np.flatnonzero(curve.relative_errors()[curve.ranks] <= error)
    return int(curve.ranks[reached[0]] if len(reached) else curve.ranks[-1])


def _price(layer: LayerCurves, number: int, constraints: Sequence[Constraint]) -> float:
    """Cost of the middle target under a curve, and how far the curve is from reaching it."""
    curve = layer.curves[number]
    rank = _rank_at(layer, number, TARGETS[1])
    missed = max(float(curve.relative_errors()[rank]) / TARGETS[1], 1.0)
    return missed * sum(c.at(curve, rank) / max(c.whole(layer), 1) for c in constraints)
