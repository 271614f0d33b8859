"""Take back, in biases, what 8 bits change on average.

Rounded weights and cut ranges shift the mean of what a node gives, in each channel by its own
amount. Such a shift does not average out in sums behind, as other rounding does, and a bias takes
it back at no cost. Nodes follow each other: each is corrected where those before it are, or what
these shift would be taken back once more at every node behind them. A node without a bias is left
as it is, such as the first of two factors: its shift reaches the second, and is taken back there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.arithmetic.nodes import BIAS, reader_counts, tensor_names, units
from cobla_onnx.calibration.evaluation.graph_cut import Frontier, Store
from cobla_onnx.graph.index import attributes
from cobla_onnx.graph.io.model_file import copy_without_initializers, unique_name
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.runtime.session import Feeds

__all__ = ["biased_nodes", "corrected_biases", "with_biases"]

Batches = Callable[[], Iterable[Feeds]]


def biased_nodes(model: onnx.ModelProto, places: Iterable[int]) -> dict[int, int]:
    """Find those of some nodes that have a stored bias for each channel.

    Parameters
    ----------
    places : iterable of int
        Of nodes with weights, see `weighted_nodes`.

    Returns
    -------
    dict of int to int
        By place, the axis of the channels of what the node gives.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for place in places:
        node = model.graph.node[place]
        bias = stored.get(node.input[BIAS]) if len(node.input) > BIAS else None
        if bias is None or len(bias.dims) != 1 or bias.data_type != onnx.TensorProto.FLOAT:
            continue
        if node.op_type != "Gemm":
            found[place] = 1
        elif attributes(node).get("beta", 1.0) == 1.0 and bias.dims[0] == units(node, stored):
            found[place] = -1
    return found


def corrected_biases(
    model: onnx.ModelProto,
    narrow: onnx.ModelProto,
    nodes: Mapping[int, int],
    named: Mapping[int, str],
    batches: Batches,
) -> dict[int, NDArray[np.float32]]:
    """Choose biases with which nodes in 8 bits give on average what they give in floating point.

    Parameters
    ----------
    model : ModelProto
        In floating point; its nodes are in topological order.
    narrow : ModelProto
        The same in 8 bits.
    nodes : mapping of int to int
        What `biased_nodes` gives.
    named : mapping of int to str
        Names in `narrow` of these nodes.
    batches : callable
        Gives a fresh iterator over the samples.

    Returns
    -------
    dict of int to float32 array, shape (channels,)
        Biases by the place of the node in `model`.

    Raises
    ------
    ModelError
        If onnxruntime does not run them.
    """
    open_ended = copy_without_initializers(narrow, ())
    there = {node.name: place for place, node in enumerate(open_ended.graph.node)}
    order = sorted(nodes, key=lambda place: there[named[place]])
    read = {place: f"cobla-onnx/bias/{place}" for place in order}
    for place in order:
        open_ended.graph.node[there[named[place]]].input[BIAS] = read[place]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    floats, codes = Frontier(model, batches), Frontier(open_ended, batches)
    found = dict[int, NDArray[np.float32]]()
    for place in order:
        bias = stored[model.graph.node[place].input[BIAS]]
        found[place] = tensor_array(bias, bias.name).astype(np.float32)
        given = {read[other]: value for other, value in found.items()}
        wanted, floats = _mean(floats, model, place, nodes[place], {})
        seen, codes = _mean(codes, open_ended, there[named[place]], nodes[place], given)
        # Where something is no number there is nothing to take back.
        if np.isfinite(wanted).all() and np.isfinite(seen).all():
            found[place] = (found[place] + (wanted - seen)).astype(np.float32)
    return found


def _mean(
    samples: Frontier,
    model: onnx.ModelProto,
    place: int,
    axis: int,
    weights: Mapping[str, NDArray[np.float32]],
) -> tuple[Float64, Frontier]:
    """Average what a node gives in each channel; also return the samples, advanced to it."""
    output = model.graph.node[place].output[0]
    crossing, store = samples.crossing(place), Store()
    taps = samples.taps([*crossing, output], weights)
    total, count = np.zeros(()), 0
    for feeds in samples.batches():
        values = taps.run(feeds)
        rows = np.moveaxis(values[output], axis, 0)
        rows = rows.reshape(len(rows), -1)
        with np.errstate(invalid="ignore"):
            total = total + rows.sum(axis=1, dtype=np.float64)
        count += rows.shape[1]
        store.put({name: values[name] for name in crossing})
    return total / max(count, 1), samples.moved_to(store)


def with_biases(
    model: onnx.ModelProto, biases: Mapping[int, NDArray[np.float32]]
) -> onnx.ModelProto:
    """Return a copy in which some nodes have other biases.

    Parameters
    ----------
    biases : mapping of int to float32 array
        By the place of the node. One that several nodes read stays for the others.
    """
    result = copy_without_initializers(model, ())
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    readers, taken = reader_counts(model), tensor_names(model)
    for place, bias in biases.items():
        node = result.graph.node[place]
        tensor = stored[node.input[BIAS]]
        readers[tensor.name] -= 1
        if readers[tensor.name]:
            tensor = result.graph.initializer.add(name=unique_name(tensor.name, taken))
            node.input[BIAS] = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(bias, tensor.name))
    return result
