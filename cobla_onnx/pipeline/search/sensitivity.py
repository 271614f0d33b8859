"""Measure how much an output error of each layer costs the network.

Layers are truncated one at a time, and the loss of the whole network is measured on a few dozen
samples. A handful of levels under one scheme give each layer's response, loss against squared
relative output error, which is close to a power law; it turns the error curves of all schemes
into loss curves. In a model of many layers, some give the shape of that law, and for the others
one level gives the scale. Points that an allocation chooses are measured, too, unless measured
ones are near, and correct the response of their own curve; they are measured on more samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cobla_onnx.allocation import Choice, Constraint, LayerCurves, OutputError
from cobla_onnx.allocation.problem import Float64
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.layers import Layer
from cobla_onnx.pipeline.search.point_losses import Point, PointLosses
from cobla_onnx.runtime.progress import tracked
from cobla_onnx.text import quoted
from cobla_onnx.wording import option_name

__all__ = [
    "FIRST_SAMPLES",
    "MANY",
    "PROBE_SAMPLES",
    "Response",
    "Sensitivity",
    "affordable_samples",
    "enough_samples",
]

# Most samples on which layers are truncated one at a time, most of these before anything is
# allocated, and least where fewer are enough.
PROBE_SAMPLES, FIRST_SAMPLES, LEAST_SAMPLES = 48, 24, 4
# Relative standard error of the mean loss that is good enough. At the minimum of a sum, a
# deviation d in the logarithm of each term adds about d^2 / 2 to it: 5 %.
PRECISION = 0.3

# Most passes over the calibration split, in runs of the whole model, that the samples of a model of
# many layers may cost; each layer's runs begin at the layer, so half of one on average.
PASSES = 5

# Squared relative output errors at which layers are measured. In a model of more than `MANY` layers
# only `SHAPED` of them are measured at all three, and the others at the middle one.
TARGETS = (0.03, 0.1, 0.3)
MIDDLE = TARGETS[1]
MANY, SHAPED = 32, 12
# Distance of two errors, in logarithms, up to which the loss at one predicts that at the other, in
# models of many layers: responses grow with powers of the error that are within about 0.3 of 1. In
# models of few layers such points decide (ResNet-20 at memory 0.4: loss 0.31 held back, not 0.23).
NEAR = 0.2
# Share of a plan's predicted loss up to which a layer's own is not measured at a second point of a
# curve: half as much again or less of it would be a hundredth of all.
SMALL = 0.02
# Factor between the loss of a chosen point as predicted and as measured from which the next levels
# are measured as well, where levels are bits and not ranks, and where the loss is not small. Where
# a layer's outputs have a few very large entries, their errors are the relative error, and those of
# small entries the loss (MiniLM: a layer in 6 bits loses 227 times what it does in 8, at 1.3 times
# the error).
SURPRISE = 3.0
# Losses and errors below these are rounding errors.
LEAST_LOSS = 1e-8
LEAST_ERROR = 1e-9
# Largest loss, and its logarithm: two close points may extrapolate beyond any float, outputs may
# overflow, and solvers of linear programmes take costs from 1e20 for infinite.
MOST_LOG = 40.0
MOST_LOSS = math.exp(MOST_LOG)


def enough_samples(losses: Float64) -> int:
    """Return how many samples give the mean of such losses with relative error `PRECISION`.

    By the standard error of the mean: n = (deviation / (mean * precision))^2.

    Parameters
    ----------
    losses : float64 array, shape (samples,)

    Returns
    -------
    int
        At least `LEAST_SAMPLES`, and at most as many as there are losses.

    Examples
    --------
    >>> enough_samples(np.array([1.0, 1.2] * 20)), enough_samples(np.array([0.0, 1.0] * 20))
    (4, 12)
    """
    mean = float(losses.mean())
    if len(losses) <= LEAST_SAMPLES or mean <= LEAST_LOSS:
        return len(losses)
    needed = (float(losses.std(ddof=1)) / (PRECISION * mean)) ** 2
    return min(max(math.ceil(needed), LEAST_SAMPLES), len(losses))


def affordable_samples(layers: int, samples: int) -> int:
    """Return on how many samples a model of many layers is measured, by what that costs.

    Parameters
    ----------
    layers : int
        More than `MANY`.
    samples : int
        Size of the calibration split.

    Examples
    --------
    >>> affordable_samples(72, 103), affordable_samples(72, 1000), affordable_samples(500, 16)
    (10, 48, 4)
    """
    points = layers + SHAPED * (len(TARGETS) - 1)
    return min(max(2 * PASSES * samples // points, LEAST_SAMPLES), PROBE_SAMPLES)


@dataclass
class Response:
    """Loss of the network against the squared relative output error of one layer.

    Interpolated between measured points in logarithms; below them proportional to the error,
    above them at least proportional.
    """

    points: dict[float, float] = field(default_factory=dict)

    def add(self, error: float, loss: float) -> None:
        """Add a measured point; a loss that is not finite counts as the largest."""
        most = min(loss, MOST_LOSS) if math.isfinite(loss) else MOST_LOSS
        self.points[max(error, LEAST_ERROR)] = max(most, LEAST_LOSS)

    def knows(self, error: float, near: float) -> bool:
        """Whether a point with an error within a factor of exp(near) was measured."""
        wanted = math.log(max(error, LEAST_ERROR))
        return any(abs(math.log(known) - wanted) <= near for known in self.points)

    def shape_as(self, shape: Mapping[float, float]) -> None:
        """Add the points that follow from the one measured if the loss grows as `shape` says.

        Parameters
        ----------
        shape : mapping of float to float
            Maps factors of the error to factors of the loss.
        """
        ((error, loss),) = self.points.items()
        for more, grown in shape.items():
            self.add(error * more, loss * grown)

    def logarithms(self) -> tuple[Float64, Float64]:
        """Measured points in logarithms: errors ascending, losses made non-decreasing."""
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
    losses : PointLosses
    first : PointLosses, optional
        On fewer samples: before anything is allocated, layers are measured on these.

    Attributes
    ----------
    responses : list of Response
        One for each layer.
    """

    def __init__(self, losses: PointLosses, first: PointLosses | None = None) -> None:
        self._losses, self._first = losses, first or losses
        self._curves = [each.curves for each in losses.variants]
        self.responses = [Response() for _ in losses.variants]
        self._own: dict[tuple[int, int], Response] = {}
        # Curves of layers on which a chosen point was measured.
        self._refined: set[tuple[int, int]] = set()

    @property
    def samples(self) -> int:
        """Samples on which the responses were measured, most of them at least."""
        return self._losses.samples or self._first.samples

    def copy(self) -> Sensitivity:
        """Return a copy of the measurements so far, to be refined independently."""
        result = copy.copy(self)
        result.responses = [Response(dict(r.points)) for r in self.responses]
        result._own = {key: Response(dict(r.points)) for key, r in self._own.items()}
        result._refined = set(self._refined)
        return result

    def measure(
        self,
        constraints: Sequence[Constraint],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Measure every layer under its cheapest scheme for the constraints."""
        points = []
        count = len(self._curves)
        shaped = set(range(count))
        if count > MANY:
            shaped = set(np.linspace(0, count - 1, SHAPED).round().astype(int).tolist())
        for index, layer in enumerate(self._curves):
            chosen = min(range(len(layer.curves)), key=lambda k: _price(layer, k, constraints))
            targets = TARGETS if index in shaped else (MIDDLE,)
            levels = tuple(sorted({_level_at(layer, chosen, target) for target in targets}))
            points.append(Point(index, chosen, levels))
        measured = zip(points, self._first.at(points), strict=True)
        overflows = True
        for point, losses in tracked(measured, len(points), progress):
            overflows &= not any(map(math.isfinite, losses))
            errors = self._curves[point.layer].curves[point.curve].errors
            for level, loss in zip(point.levels, losses, strict=True):
                error = float(errors[level])
                self.responses[point.layer].add(error, loss)
                self._own.setdefault((point.layer, point.curve), Response()).add(error, loss)
        if overflows and points:
            raise _overflow(self._losses.variants[0].layer)
        if len(shaped) < count:
            shape = _shape([self.responses[index] for index in shaped])
            for index in set(range(count)) - shaped:
                self.responses[index].shape_as(shape)

    def refine(self, choices: Sequence[Choice | None]) -> bool:
        """Measure the chosen points themselves; return whether any of them was new.

        In models of many layers, points close to measured ones are skipped, see `NEAR`; and in all
        models those of small losses, see `SMALL`. Where bits lose something else than predicted,
        the next levels are measured as well, see `SURPRISE`.
        """
        near = NEAR if len(self._curves) > MANY else 0.0
        chosen = [(index, choice) for index, choice in enumerate(choices) if choice is not None]
        losses = [float(self._curve(i, choice.curve)[choice.level]) for i, choice in chosen]
        new = []
        for (index, choice), loss in zip(chosen, losses, strict=True):
            curve = index, choice.curve
            own = self._own.setdefault(curve, Response())
            counts = curve not in self._refined or loss > SMALL * sum(losses)
            if counts and not own.knows(self._error(index, choice), near):
                new.append((index, choice))
        points = [Point(index, choice.curve, (choice.level,)) for index, choice in new]
        measured = self._add(points)
        expected = {index: loss for (index, _), loss in zip(chosen, losses, strict=True)}
        beside = [
            self._beside(point)
            for point, (loss,) in zip(points, measured, strict=True)
            if _surprises(expected[point.layer], loss, SMALL * sum(losses))
        ]
        if any(point.levels for point in beside):
            self._add([point for point in beside if point.levels])
        return bool(new)

    def _add(self, points: Sequence[Point]) -> list[list[float]]:
        """Measure points of curves, which correct these curves alone; return their losses."""
        measured = list(self._losses.at(points))
        for point, losses in zip(points, measured, strict=True):
            key = point.layer, point.curve
            own = self._own.setdefault(key, Response())
            for level, loss in zip(point.levels, losses, strict=True):
                own.add(self._error(point.layer, Choice(point.curve, level)), loss)
            self._refined.add(key)
        return measured

    def _beside(self, point: Point) -> Point:
        """Return the levels next to a point's own that are not measured; none if they are ranks."""
        curve = self._curves[point.layer].curves[point.curve]
        own = self._own[point.layer, point.curve]
        place = int(np.searchsorted(curve.levels, point.levels[0]))
        near = () if curve.nested else curve.levels[max(place - 1, 0) : place + 2].tolist()
        unknown = [level for level in near if not own.knows(float(curve.errors[level]), 0.0)]
        return Point(point.layer, point.curve, tuple(unknown))

    def _error(self, index: int, choice: Choice) -> float:
        return float(self._curves[index].curves[choice.curve].errors[choice.level])

    def objective(self) -> OutputError:
        """Return the separable loss that follows from the measurements so far."""
        return OutputError(
            [
                [self._curve(index, number) for number in range(len(layer.curves))]
                for index, layer in enumerate(self._curves)
            ]
        )

    def _curve(self, index: int, number: int) -> Float64:
        errors = self._curves[index].curves[number].errors
        response = self.responses[index]
        losses = response(errors)
        own = self._own.get((index, number))
        if own is not None:
            known, measured = own.logarithms()
            ratios = measured - np.log(np.maximum(response(np.exp(known)), LEAST_LOSS))
            wanted = np.log(np.maximum(errors, LEAST_ERROR))
            losses = np.minimum(losses * np.exp(np.interp(wanted, known, ratios)), MOST_LOSS)
        # The loss must not rise as the error falls, which it does with the level.
        return np.minimum.accumulate(losses)


def _surprises(expected: float, measured: float, least: float) -> bool:
    """Whether a loss is not about as expected, and either is large enough to matter."""
    smaller, larger = sorted((max(expected, LEAST_LOSS), max(measured, LEAST_LOSS)))
    return larger > least and larger > SURPRISE * smaller


def _overflow(layer: Layer) -> ModelError:
    """No approximation of any layer leaves the network's loss finite."""
    return ModelError(
        f"the network's loss is not finite wherever a layer is approximated, such as that of node "
        f"{quoted(layer.name)}, since its numbers leave the range of their type; look for very "
        f"large weights and data, or leave layers out by {option_name('exclude')}"
    )


def _shape(responses: Sequence[Response]) -> dict[float, float]:
    """Median factors by which the loss grows between `MIDDLE` and the other targets."""
    errors = np.array(TARGETS)
    grown = [np.log(r(errors)) - np.log(r(np.array([MIDDLE]))) for r in responses]
    factors = np.exp(np.median(grown, axis=0))
    pairs = zip(errors / MIDDLE, factors, strict=True)
    return {float(error): float(factor) for error, factor in pairs if error != 1.0}


def _level_at(layer: LayerCurves, number: int, error: float) -> int:
    """Least candidate level whose error is at most `error`, or the largest."""
    curve = layer.curves[number]
    reached = np.flatnonzero(curve.errors[curve.levels] <= error)
    return int(curve.levels[reached[0]] if len(reached) else curve.levels[-1])


def _price(layer: LayerCurves, number: int, constraints: Sequence[Constraint]) -> float:
    """Cost of the middle target under a curve, times how far the curve misses its error."""
    curve = layer.curves[number]
    level = _level_at(layer, number, MIDDLE)
    missed = max(float(curve.errors[level]) / MIDDLE, 1.0)
    return missed * sum(c.at(curve, level) / max(c.whole(layer), 1) for c in constraints)
