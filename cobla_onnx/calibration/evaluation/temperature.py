"""Choose the temperature of class distributions, so that decisions overfit less.

Where a network is certain about most samples, the Kullback-Leibler divergence is dominated by
the few whose classes are close to each other, and ranks fitted to these do not suit other
samples. At a temperature T, logits are divided by T before the softmax (Hinton, Vinyals and
Dean 2015, Distilling the Knowledge in a Neural Network, section 2.1), and more samples
contribute. The contribution of a sample is its divergence under a small equal perturbation of
all logits, half of 1 - sum p^2 to second order. The temperature is the lowest at which
contributions are even enough, by Kish's effective sample size (1965, Survey Sampling). A
network that is uncertain about all samples is compared at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import CLASSES, TINY, Measure
from cobla_onnx.calibration.evaluation.loss import log_probabilities
from cobla_onnx.graph.io.model_file import copy_without_initializers, unique_name
from cobla_onnx.graph.protos import opset_of

__all__ = ["doubts", "soften", "temperatures"]

# Temperatures in steps of the square root of 2; the last is nearly the limit, in which the
# divergence is the squared distance of centred logits.
LADDER = tuple(2.0 ** (step / 2) for step in range(9))
# Effective fraction of the samples that is enough.
EVEN = 0.6
# Most positions of a sample that are used.
POSITIONS = 32


def temperatures(
    measures: Mapping[str, Measure],
    found: Mapping[str, Mapping[tuple[int, bool], Sequence[NDArray[np.float64]]]],
) -> dict[str, float]:
    """Choose a temperature for each output that is a class distribution.

    Parameters
    ----------
    measures : mapping of str to Measure
        How each output is compared.
    found : mapping of str to mapping
        For each output, the doubt of each sample, batch by batch as `doubts` returns it, by
        class axis and whether values are taken as logits. Without an entry the temperature is 1.
    """
    chosen = {}
    for name, measure in measures.items():
        if measure.kind not in CLASSES or measure.axis is None:
            continue
        parts = found.get(name, {}).get((measure.axis, measure.of_logits))
        if not parts:
            chosen[name] = LADDER[0]
            continue
        even = _evenness(np.concatenate(parts, axis=1)) >= EVEN
        chosen[name] = LADDER[int(np.argmax(even))] if even.any() else LADDER[-1]
    return chosen


def doubts(
    values: NDArray[np.float64], logits: bool, axis: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Doubt, p (1 - p), at each temperature, by sample and by class.

    Of many positions in a sample, evenly spaced ones are used.

    Returns
    -------
    of_samples : float64 array, shape (temperatures, samples)
        Summed over classes, mean over positions.
    of_classes : float64 array, shape (temperatures, samples, classes)
        Summed over positions.
    """
    lines = np.moveaxis(values, axis, -1)
    lines = lines.reshape(len(values), -1, values.shape[axis])
    lines = lines[:, :: -(-lines.shape[1] // POSITIONS)]
    scores = log_probabilities(lines, logits, 2)
    of_samples, of_classes = [], []
    for temperature in LADDER:
        p = np.exp(log_probabilities(scores / temperature, True, 2))
        squares = np.square(p)
        of_samples.append(1.0 - squares.sum(axis=2).mean(axis=1))
        of_classes.append(p.sum(axis=1) - squares.sum(axis=1))
    return np.array(of_samples), np.array(of_classes)


def _evenness(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Effective fraction of the samples, shape (temperatures,)."""
    squares = shares.shape[1] * np.square(shares).sum(axis=1)
    even = np.square(shares.sum(axis=1)) / np.maximum(squares, np.finfo(np.float64).tiny)
    return np.asarray(even)


def soften(
    model: onnx.ModelProto, measures: Mapping[str, Measure], temperatures: Mapping[str, float]
) -> tuple[onnx.ModelProto, dict[str, Measure]]:
    """Copy a model so that its class outputs are logits over a temperature.

    Parameters
    ----------
    model : ModelProto
    measures : mapping of str to Measure
        How each output is compared.
    temperatures : mapping of str to float
        Temperatures of outputs that are ``logits`` or ``probabilities``; the latter are
        converted by their logarithms.

    Returns
    -------
    model : ModelProto
    measures : dict of str to Measure
        The measures by the output names of the copy.
    """
    result = copy_without_initializers(model, ())
    graph = result.graph
    found = dict(measures)
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    version = opset_of(model)
    for value in graph.output:
        if value.name not in temperatures:
            continue
        measure = measures[value.name]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)

        def new(suffix: str, source: str = value.name) -> str:
            return unique_name(f"{source}/{suffix}", taken)

        logits = value.name
        if measure.kind == "probabilities":
            least = max(TINY, float(np.finfo(dtype).tiny))
            bounded, logits = new("bounded"), new("logarithm")
            if version < 8:
                # Max does not broadcast in this opset.
                clip = onnx.helper.make_node("Clip", [value.name], [bounded], min=least)
                graph.node.append(clip)
            else:
                floor = new("least")
                graph.initializer.append(
                    onnx.numpy_helper.from_array(np.array(least, dtype), floor)
                )
                graph.node.add(op_type="Max", input=[value.name, floor], output=[bounded])
            graph.node.add(op_type="Log", input=[bounded], output=[logits])
        softened, temperature = new("softened"), new("temperature")
        graph.initializer.append(
            onnx.numpy_helper.from_array(np.array([temperatures[value.name]], dtype), temperature)
        )
        graph.node.add(op_type="Div", input=[logits, temperature], output=[softened])
        del found[value.name]
        found[softened] = replace(measure, kind="logits")
        value.name = softened
    return result, found
