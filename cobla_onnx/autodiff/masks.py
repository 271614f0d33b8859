"""Gradients with respect to masks, without forming the gradient with respect to the weight.

With W = second diag(m) first, the layer's output is second(m z), z = first(x). So the
derivative of a sample's loss with respect to m_j is the sum over positions of z_j t_j, where
t = second^T dy is the gradient with respect to the input of the second factor node. That takes
two products of the size of the factors for each sample, whatever m is. (It is Li and Shi's
dE/dm_j = s_j u_j^T (dE/dW) v_j, contracted in another order.)

If the layer itself runs through its factors, z and t exist already, and the gradients with
respect to all masks cost almost nothing beyond the forward and the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from cobla_onnx.autodiff.backward import Backward
from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.prepare import Prepared, Substitutes
from cobla_onnx.autodiff.vjp import NoRuleError, Step, find_rule
from cobla_onnx.autodiff.vjp.registry import Sizes
from cobla_onnx.graph.macs import infer_tensors
from cobla_onnx.graph.protos import copied_node

__all__ = ["Contracted", "MaskedWeight", "through_factors", "write_mask_gradients"]

# Axis of the outputs of a convolution's weight.
CONVOLUTIONS = {"Conv": 0, "ConvTranspose": 1}


@dataclass(frozen=True)
class MaskedWeight:
    """A weight and the factor nodes that would take its place.

    Attributes
    ----------
    weight : str
        Name of the dense weight; becomes an input of the graph.
    first, second : str
        Names of the factors in the nodes; become inputs of the graph.
    first_shape, second_shape : tuple of int
    uses : tuple of (NodeProto, NodeProto)
        For each node that reads the weight, the two that would replace it: the first reads
        the layer's input and `first`, the second the first's output and `second`, and is
        named for the layer's output. See `cobla_onnx.variants.low_rank.nodes.factor_nodes`.
    mask : str or None
        Name of the masks, of shape (ranks,), which become an input: the layer runs as
        second(m first(x)), and its weight is not an input. Without, the layer runs with its
        weight, which the caller makes of the masks.
    """

    weight: str
    first: str
    second: str
    first_shape: tuple[int, ...]
    second_shape: tuple[int, ...]
    uses: tuple[tuple[onnx.NodeProto, onnx.NodeProto], ...]
    mask: str | None = None

    def masked(self, use: tuple[onnx.NodeProto, onnx.NodeProto]) -> str:
        """Name of what the second node of a use reads where there are masks."""
        return f"{use[0].output[0]}/masked"

    def differentiated(self, use: tuple[onnx.NodeProto, onnx.NodeProto]) -> str:
        """Name of the tensor with respect to which the backward pass gives the gradient."""
        return use[1].output[0] if self.mask is None else self.masked(use)

    def mask_shape(self, use: tuple[onnx.NodeProto, onnx.NodeProto]) -> Sizes:
        """Shape in which masks are multiplied onto the first node's output."""
        node = use[0]
        if node.op_type in CONVOLUTIONS:
            ranks = self.first_shape[CONVOLUTIONS[node.op_type]]
            return (ranks, *(1 for _ in self.first_shape[2:]))
        if node.input[1] == self.first:
            return (self.first_shape[-1],)
        return (self.first_shape[-2], 1)


@dataclass(frozen=True)
class Contracted:
    """What `write_mask_gradients` wrote.

    Attributes
    ----------
    outputs : dict of str to str
        For each weight, the gradients of shape (samples, rank); for a grouped convolution
        (samples, groups * rank).
    shapes : dict of str to tuple of int
        Shapes of these outputs.
    inputs : dict of str to tuple of int
        Shapes of the factors.
    blocked : dict of str to str
        For each weight without a gradient, why.
    """

    outputs: dict[str, str]
    shapes: dict[str, Sizes]
    inputs: dict[str, Sizes]
    blocked: dict[str, str]


def through_factors(masks: Sequence[MaskedWeight]) -> Substitutes:
    """Nodes by which the layers run through their factors and masks."""
    result = Substitutes()
    for mask in masks:
        if mask.mask is None:
            continue
        result.inputs[mask.first] = tuple(mask.first_shape)
        result.inputs[mask.second] = tuple(mask.second_shape)
        result.inputs[mask.mask] = mask.mask_shape(mask.uses[0])[:1]
        for use in mask.uses:
            between, masked = use[0].output[0], mask.masked(use)
            shape = np.array(mask.mask_shape(use), np.int64)
            result.constants.append(onnx.numpy_helper.from_array(shape, f"{masked}/shape"))
            spread = f"{masked}/mask"
            second = copied_node(use[1])
            second.input[list(second.input).index(between)] = masked
            result.nodes[second.output[0]] = [
                use[0],
                onnx.helper.make_node("Reshape", [mask.mask, f"{masked}/shape"], [spread]),
                onnx.helper.make_node("Mul", [between, spread], [masked]),
                second,
            ]
    return result


def write_mask_gradients(
    g: Emitter,
    forward: Prepared,
    masks: Sequence[MaskedWeight],
    found: Backward,
    samples: int,
) -> Contracted:
    """Write the mask gradients of each weight, summed over its uses."""
    result = Contracted({}, {}, {}, {})
    for mask in masks:
        reasons = [
            found.blocked[name]
            for name in map(mask.differentiated, mask.uses)
            if name in found.blocked
        ]
        if mask.mask is None:
            result.inputs[mask.first] = tuple(mask.first_shape)
            result.inputs[mask.second] = tuple(mask.second_shape)
        try:
            if reasons:
                raise NoRuleError(reasons[0])
            parts = [_contract(g, forward, mask, use, found, samples) for use in mask.uses]
        except NoRuleError as error:
            result.blocked[mask.weight] = str(error)
            continue
        output = g.name(f"mask_gradient/{mask.weight}")
        g.named(output, g.total([term for term, _ in parts]))
        result.outputs[mask.weight] = output
        result.shapes[output] = (samples, parts[0][1])
    return result


def _contract(
    g: Emitter,
    forward: Prepared,
    mask: MaskedWeight,
    use: tuple[onnx.NodeProto, onnx.NodeProto],
    found: Backward,
    samples: int,
) -> tuple[str, int]:
    """Sum z t over all but samples and ranks; return the sum and the number of ranks."""
    first = use[0]
    if mask.mask is None:
        between, t, shape = _beside(g, forward, mask, use, found)
    else:
        between, t = first.output[0], found.gradients[mask.masked(use)]
        shape = forward.shapes[between]
    data_left = first.input[1] == mask.first
    convolves = first.op_type in CONVOLUTIONS
    axis = 1 if convolves else len(shape) - (1 if data_left else 2)
    product = g.mul(between, t)
    if axis == 0 or shape[0] % samples:
        if samples > 1:
            raise NoRuleError(f"samples do not lie along the first axis of {first.input[0]!r}")
        total = g.sum(product, [a for a in range(len(shape)) if a != axis])
        return g.reshape(total, [1, shape[axis]]), shape[axis]
    # Rows that were flattened into the first axis belong to their sample.
    split = [samples, shape[0] // samples, math.prod(shape[1:axis]), shape[axis], -1]
    return g.sum(g.reshape(product, split), [1, 2, 4]), shape[axis]


def _beside(
    g: Emitter,
    forward: Prepared,
    mask: MaskedWeight,
    use: tuple[onnx.NodeProto, onnx.NodeProto],
    found: Backward,
) -> tuple[str, str, Sizes]:
    """Write z and t for a layer that runs with its weight; return them and their shape."""
    first, second = copied_node(use[0]), use[1]
    between = g.name(f"{mask.weight}/between")
    place = list(second.input).index(use[0].output[0])
    first.output[0] = first.name = between
    shapes = {**forward.shapes, mask.first: mask.first_shape, mask.second: mask.second_shape}
    shapes[between] = _shape(forward, first, shapes)
    g.nodes.append(first)
    apart = copied_node(second)
    apart.input[place] = between
    step = Step.of(
        apart,
        [found.gradients[second.output[0]]],
        [i == place for i in range(len(second.input))],
        shapes,
        {},
    )
    rule = find_rule(second)
    assert rule is not None
    t = rule(g, step)[place]
    assert t is not None
    return between, t, shapes[between]


def _shape(forward: Prepared, node: onnx.NodeProto, shapes: Mapping[str, Sizes]) -> Sizes:
    """Infer the shape of a node's output."""
    value = onnx.helper.make_tensor_value_info
    for name in node.input:
        if name not in shapes:
            raise NoRuleError(f"the shape of {name!r} is not known")
    inputs = [value(n, onnx.TensorProto.FLOAT, shapes[n]) for n in node.input]
    outputs = [onnx.ValueInfoProto(name=node.output[0])]
    graph = onnx.helper.make_graph([node], "shape", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=forward.model.opset_import)
    sizes = infer_tensors(model, {})[0].get(node.output[0])
    if sizes is None or any(size is None for size in sizes):
        raise NoRuleError(f"the shape of {node.output[0]!r} is not known")
    return tuple(size for size in sizes if size is not None)
