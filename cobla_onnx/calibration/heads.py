"""Weight each output of a model's last layers by its effect on the loss.

A layer that makes class logits makes them for all classes, of which the samples may show a
few: a recogniser of 6,625 characters reads 95 of them in English text. Its error is then best
measured as the loss is: by the loss's second derivative by each output. For the divergence of
class distributions its diagonal is p (1 - p), for values compared by features the reciprocal of
each feature's variance. Only layers whose outputs reach the loss one by one are weighted; for
those further back, weights of single outputs say too little (a full second moment of gradients
was measured to be worse than none).
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

__all__ = ["Curvature", "curvatures", "importances"]


@dataclass(frozen=True)
class Curvature:
    """How much each entry of an output counts.

    Attributes
    ----------
    axis : int
        Along which entries differ.
    axes : int
        Number of axes of the output.
    classes : bool
        Whether entries are classes: a softmax of which the derivative knows is passed then.
    weights : float64 array, shape (size,)
        Of the entries along the axis; their mean is 1, and none is 0.
    """

    axis: int
    axes: int
    classes: bool
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class _Place:
    """A tensor, its number of axes, the one that is followed, and what lies along it."""

    name: str
    axis: int
    axes: int
    classes: bool


# Shares of the weight that all outputs may have alike: samples do not show all that will come.
EVEN = tuple(step / 10 for step in range(1, 11))
# Where more than this has to be the same for all, everything is: layers are measured on samples
# that the weights are made of, which must not flatter them.
TOO_EVEN = 0.5
# Operators behind which each number is the same but for a constant, or its mean or its part
# that is positive.
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
    """Second derivative of the loss by each entry of an output, but for a factor.

    Outputs that are compared in another way than by classes or by features have none.
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
    """Weights of mean 1, of which a share is the same for all."""
    mean = weights.mean()
    return (1 - even) * weights / mean + even if mean > 0 else np.ones_like(weights)


def _even_share(halves: NDArray[np.float64]) -> float:
    """Share with which each half of the samples tells best what the other one shows.

    By the likelihood of one half under the mixture made of the other (deleted interpolation,
    Jelinek and Mercer 1980): where few samples of many classes tell nothing of the next ones,
    all classes count alike.
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
    """Weights of the outputs of those layers that make the model's outputs one by one.

    Parameters
    ----------
    model : ModelProto
        Whose outputs are compared, with its nodes in topological order.
    layers : sequence of Layer
    curvatures : mapping of str to Curvature
        By the name of the output.

    Returns
    -------
    dict of str to float64 array, shape (outputs,)
        By the layer's name; their mean is 1.
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
    """Walks from an output to the layer that makes its entries along an axis."""

    def __init__(self, model: onnx.ModelProto, layers: Sequence[Layer]) -> None:
        self._graph = GraphIndex(model)
        self._layers = {e.uses[0].output: e for e in layers if len(e.uses) == 1}
        self._shapes: dict[str, Shape] = infer_shapes(model, {})

    def layer_behind(self, place: _Place, size: int) -> Layer | None:
        """Return the layer, if its outputs are the entries along the axis and nothing else."""
        at: _Place | None = place
        while at is not None and at.name not in self._layers:
            at = self._before(at, size)
        if at is None:
            return None
        layer = self._layers[at.name]
        return layer if _outputs_along(layer, at) == size else None

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
    if layer.op == "Conv":
        return layer.shape[0] if place.axis == 1 else None
    if layer.op == "ConvTranspose":
        return layer.shape[1] if place.axis == 1 else None
    if layer.weight_input != 1 or place.axis != place.axes - 1:
        return None
    if layer.op == "Gemm":
        return layer.shape[0 if layer.attributes.get("transB", 0) else 1]
    return layer.shape[-1] if all(size == 1 for size in layer.shape[:-2]) else None
