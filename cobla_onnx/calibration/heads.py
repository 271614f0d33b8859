"""Weight each output of a model's last layers by its effect on the loss.

A layer that produces class logits does so for all classes, of which the samples may show only a
few: a recogniser of 6,625 characters reads 95 of them in English text. Its error is then best
weighted as in the loss, by the second derivative of the loss with respect to each output. For
the divergence of class distributions the diagonal of that is p (1 - p); for values compared by
features it is the reciprocal of each feature's variance. Only layers whose outputs reach the
loss one by one are weighted. For layers further back, weights of single outputs are too crude (a
full second moment of gradients was measured to be worse than none).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.survey import OutputFacts
from cobla_onnx.calibration.evaluation.temperature import LADDER
from cobla_onnx.graph.index import GraphIndex
from cobla_onnx.graph.layers import Layer, attributes
from cobla_onnx.graph.macs import Shape, infer_shapes
from cobla_onnx.graph.operators.base import operator_of

__all__ = ["Curvature", "curvatures", "importances"]


@dataclass(frozen=True)
class Curvature:
    """Weights of the entries of an output.

    Attributes
    ----------
    axis : int
        Axis of the entries.
    axes : int
        Number of axes of the output.
    classes : bool
        Whether entries are classes; the derivative then includes a softmax before the output.
    weights : float64 array, shape (size,)
        Weights of the entries along the axis; their mean is 1, and none is 0.
    """

    axis: int
    axes: int
    classes: bool
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class _Place:
    """A tensor on the walk, with the axis that is followed and the meaning of its entries."""

    name: str
    axis: int
    axes: int
    classes: bool


# Candidate fractions of the weight that is even: samples do not show all future classes.
EVEN = tuple(step / 10 for step in range(1, 11))
# If more than this fraction must be even, all of it is: layers are measured on the samples from
# which the weights are computed, and would look better than they are.
TOO_EVEN = 0.5
# Operators that keep each number up to a constant factor, or take its mean or its positive part.
ALONG = frozenset({"Identity", "Cast", "Dropout", "Relu", "Clip", "Resize", "Upsample"})
SOFTMAX = frozenset({"Softmax", "LogSoftmax"})
POOLS = frozenset({"GlobalAveragePool", "AveragePool"})
RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
SUMS = frozenset({"Add", "Sub"})


def curvatures(
    measures: Mapping[str, Measure],
    facts: Mapping[str, OutputFacts],
    temperatures: Mapping[str, float],
) -> dict[str, Curvature]:
    """Second derivative of the loss with respect to each entry of an output, up to a factor.

    Only outputs that are compared by classes or by features have one.
    """
    found = {}
    for name, measure in measures.items():
        axis = measure.axis
        if axis is None:
            continue
        if measure.has_classes:
            about = facts[name].about.get((axis, measure.of_logits))
            if about is not None:
                halves = about[:, LADDER.index(temperatures.get(name, LADDER[0]))]
                weights = _mixed(halves.sum(axis=0), _even_share(halves))
                found[name] = Curvature(axis, len(facts[name].sizes), True, weights)
        elif measure.scale is not None:
            weights = np.array(measure.scale) + (measure.kind == "either") / measure.spread
            weights = _mixed(weights, EVEN[0])
            found[name] = Curvature(axis, len(facts[name].sizes), False, weights)
    return found


def _mixed(weights: NDArray[np.float64], even: float) -> NDArray[np.float64]:
    """Weights of mean 1, mixed with even weights."""
    mean = weights.mean()
    return (1 - even) * weights / mean + even if mean > 0 else np.ones_like(weights)


def _even_share(halves: NDArray[np.float64]) -> float:
    """Fraction of even weight with which each half of the samples predicts the other best.

    By the likelihood of one half under the mixture made from the other (deleted interpolation,
    Jelinek and Mercer 1980): where few samples of many classes predict nothing about others, all
    classes get the same weight.
    """
    if (halves.sum(axis=1) <= 0).any():
        return EVEN[-1]
    fits = [
        sum(float(other @ np.log(_mixed(one, even))) for one, other in (halves, halves[::-1]))
        for even in EVEN
    ]
    best = EVEN[int(np.argmax(fits))]
    return best if best <= TOO_EVEN else EVEN[-1]


def importances(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    curvatures: Mapping[str, Curvature],
) -> dict[str, NDArray[np.float64]]:
    """Weights of the outputs of layers that produce the model's outputs one by one.

    Parameters
    ----------
    model : ModelProto
        The model whose outputs are compared, with its nodes in topological order.
    layers : sequence of Layer
    curvatures : mapping of str to Curvature
        By the name of the model's output.

    Returns
    -------
    dict of str to float64 array, shape (outputs,)
        By the layer's name; their mean is 1. Of a tied weight, they are those of the one product
        whose outputs are the rows of the stored matrix.
    """
    walk = _Walk(model, layers)
    found: dict[str, NDArray[np.float64]] = {}
    for name, curvature in curvatures.items():
        start = _Place(name, curvature.axis, curvature.axes, curvature.classes)
        layer = walk.layer_behind(start, len(curvature.weights))
        if layer is not None:
            found[layer.name] = found.get(layer.name, 0.0) + curvature.weights
    return {name: weights / weights.mean() for name, weights in found.items()}


class _Walk:
    """Walks back from an output to the layer that produces its entries along an axis."""

    def __init__(self, model: onnx.ModelProto, layers: Sequence[Layer]) -> None:
        self._graph = GraphIndex(model)
        self._layers = {
            each.uses[0].output: (layer, each)
            for layer in layers
            for each in layer.readings or (layer,)
            if len(each.uses) == 1
        }
        self._shapes: dict[str, Shape] = infer_shapes(model, {})

    def layer_behind(self, place: _Place, size: int) -> Layer | None:
        """Return the layer, if its outputs are exactly the entries along the axis."""
        at: _Place | None = place
        while at is not None and at.name not in self._layers:
            at = self._before(at, size)
        if at is None:
            return None
        layer, reading = self._layers[at.name]
        if _outputs_along(reading, at) != size:
            return None
        # The other side of a square matrix would look the same.
        apart = not layer.readings or (layer.shape[0] == size != layer.shape[1])
        return layer if apart else None

    def _before(self, place: _Place, size: int) -> _Place | None:
        """Return where the entries of a tensor along an axis come from."""
        index = self._graph.producer.get(place.name)
        if index is None or not self._graph.nodes[index].input:
            return None
        node = self._graph.nodes[index]
        source = replace(place, name=node.input[0])
        if node.op_type in ALONG or (node.op_type in SOFTMAX and place.classes):
            return source
        if node.op_type in POOLS and place.axis == 1:
            return source
        if node.op_type in SUMS:
            others = [name for name in node.input if name not in self._graph.stored]
            return replace(place, name=others[0]) if len(others) == 1 else None
        if node.op_type == "Transpose":
            order = attributes(node).get("perm")
            return None if order is None else replace(source, axis=list(order)[place.axis])
        if node.op_type in RESHAPES or node.op_type == "ReduceMean":
            sizes = self._shapes.get(source.name, ())
            fitting = [axis for axis, known in enumerate(sizes) if known == size]
            return replace(source, axis=fitting[0], axes=len(sizes)) if len(fitting) == 1 else None
        return None


def _outputs_along(layer: Layer, place: _Place) -> int | None:
    """Number of a layer's outputs, if they lie along this axis of its output tensor."""
    outputs = operator_of(layer).output_axis(layer)
    if outputs is None or outputs.axis % place.axes != place.axis:
        return None
    return outputs.size
