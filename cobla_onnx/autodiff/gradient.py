"""Build, from a forward graph, the graph of its loss and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from cobla_onnx.autodiff.backward import backward
from cobla_onnx.autodiff.casting import cast_tensor
from cobla_onnx.autodiff.emitter import Emitter
from cobla_onnx.autodiff.losses import Losses, write_losses
from cobla_onnx.autodiff.masks import MaskedWeight, through_factors, write_mask_gradients
from cobla_onnx.autodiff.measures import KINDS, LossKind, Measure, as_measure
from cobla_onnx.autodiff.prepare import Prepared, prepare
from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.layers import all_inputs

__all__ = ["GradientGraph", "differentiate", "gradient_graph"]


@dataclass(frozen=True)
class GradientGraph:
    """A graph that computes a loss and its gradients.

    Attributes
    ----------
    model : ModelProto
        Inputs: those of the original, the weights under their names, targets, powers, and
        the factors of masks. To be run with onnxruntime's optimisations on.
    loss : str
        Output: loss of each sample, shape (samples,).
    samples : int
    gradients : dict of str to str
        For each weight, the output with the derivative of the sum of `loss` by it, of the
        weight's shape.
    mask_gradients : dict of str to str
        For each masked weight, the output with the derivatives of each sample's loss by
        its masks, shape (samples, rank).
    targets, powers : dict of str to str
        For each output of the original with a loss, the inputs for its target (of the
        output's shape) and, for ``mse`` without a scale, for the mean square of all targets
        (a scalar).
    blocked : dict of str to str
        For each weight without a gradient, why. It is an input all the same.
    """

    model: onnx.ModelProto
    loss: str
    samples: int
    gradients: dict[str, str]
    mask_gradients: dict[str, str]
    targets: dict[str, str]
    powers: dict[str, str]
    blocked: dict[str, str]


def gradient_graph(
    model: onnx.ModelProto,
    loss: Mapping[str, LossKind | Measure],
    weights: Sequence[str],
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int = 1,
) -> onnx.ModelProto:
    """Make a graph of standard operators that computes a model's loss and its gradients.

    The result takes the model's inputs, the weights under their own names and, for each
    output with a loss, ``target/<output>`` (and for ``mse`` the scalar
    ``power/<output>``, the mean square of the targets). It gives ``loss``, one number a
    sample, and ``gradient/<weight>``, the derivative of the sum of the losses.

    Parameters
    ----------
    model : ModelProto
        Is not changed.
    loss : mapping of str to (str or Measure)
        For each output that counts, how it is compared with its target: by the
        Kullback-Leibler divergence between distributions along axis 1
        (``'probabilities'``, ``'logits'``), by cross-entropy to the target
        (``'ce-probabilities'``, ``'ce-logits'``), or by the relative mean squared error
        (``'mse'``). A `Measure` has another axis, or a scale for each feature.
    weights : sequence of str
        Names of tensors of floating type that nodes of the main graph read.
    input_shapes : mapping of str to sequence of int, optional
        Shapes of the inputs that the model leaves open, the batch included. A symbolic
        first axis that is not given is 1.
    threads : int, optional
        For a run that measures shapes, where they do not follow from the model.

    Raises
    ------
    UsageError
        If a name, a shape or a loss does not fit the model.
    ModelError
        If some weight has no gradient; names the node that blocks it.
        `differentiate` goes on without that weight.

    Examples
    --------
    >>> from onnx import parser
    >>> model = parser.parse_model('''
    ...     <ir_version: 8, opset_import: ["": 18]>
    ...     line (float[N, 3] x, float[3, 2] w) => (float[N, 2] y) { y = MatMul(x, w) }''')
    >>> graph = gradient_graph(model, {"y": "logits"}, ["w"], input_shapes={"x": [4, 3]})
    >>> [value.name for value in graph.graph.input]
    ['x', 'w', 'target/y']
    >>> [value.name for value in graph.graph.output]
    ['loss', 'gradient/w']
    """
    result = differentiate(model, loss, weights, input_shapes=input_shapes, threads=threads)
    if result.blocked:
        listed = "; ".join(f"{name!r}: {reason}" for name, reason in result.blocked.items())
        raise ModelError(f"no gradient with respect to {listed}; leave these weights out")
    return result.model


def differentiate(
    model: onnx.ModelProto,
    loss: Mapping[str, LossKind | Measure],
    weights: Sequence[str] = (),
    *,
    masks: Sequence[MaskedWeight] = (),
    constants: Sequence[str] = (),
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int = 1,
    element_type: int = onnx.TensorProto.FLOAT,
) -> GradientGraph:
    """Build the graph of a model's loss and its gradients with respect to weights and masks.

    As `gradient_graph`, but a weight whose gradient cannot be had is listed in the result
    with a reason.

    Parameters
    ----------
    masks : sequence of MaskedWeight
        Weights for which gradients with respect to masks of a factorisation are wanted. The
        weight, or what the layer runs with in its place, becomes an input, too.
    constants : sequence of str
        Further tensors that become inputs, without a gradient.
    element_type : {TensorProto.FLOAT, TensorProto.DOUBLE}
        Floating type of everything in the graph.
    """
    measures = {name: as_measure(measure) for name, measure in loss.items()}
    _check(model, measures)
    dense = [mask.weight for mask in masks if mask.mask is None]
    exposed = list(dict.fromkeys([*weights, *dense, *constants]))
    factors = through_factors(masks)
    forward = prepare(model, exposed, input_shapes or {}, element_type, threads, factors)
    for name in exposed:
        if forward.types.get(name) != element_type:
            raise UsageError(f"tensor {name!r} is not of floating type and has no gradient")
    g = Emitter(_names(forward), element_type)
    written = write_losses(g, measures, _output_shapes(forward, measures))
    layers = [mask.differentiated(use) for mask in masks for use in mask.uses]
    wanted = dict.fromkeys([*weights, *layers])
    found = backward(g, forward, written.seeds, wanted)
    gradients: dict[str, str] = {}
    for name in dict.fromkeys(weights):
        if name in found.gradients:
            gradients[name] = g.name(f"gradient/{name}")
            g.named(gradients[name], found.gradients[name])
    contracted = write_mask_gradients(g, forward, masks, found, written.samples)
    blocked = {n: why for n, why in found.blocked.items() if n in set(weights)}
    shapes = {gradients[name]: forward.shapes[name] for name in gradients}
    outputs = {written.loss: (written.samples,), **shapes, **contracted.shapes}
    return GradientGraph(
        _assemble(g, forward, [*exposed, *factors.inputs], written, contracted.inputs, outputs),
        written.loss,
        written.samples,
        gradients,
        contracted.outputs,
        written.targets,
        written.powers,
        {**blocked, **contracted.blocked},
    )


def _check(model: onnx.ModelProto, loss: Mapping[str, Measure]) -> None:
    outputs = [value.name for value in model.graph.output]
    if not loss:
        raise UsageError("no output has a loss; name one of " + ", ".join(outputs))
    for name, measure in loss.items():
        if name not in outputs:
            raise UsageError(f"the model has no output {name!r}; it has " + ", ".join(outputs))
        if measure.kind not in KINDS:
            raise UsageError(
                f"output {name!r}: no loss {measure.kind!r}; choose " + ", ".join(KINDS)
            )


def _names(forward: Prepared) -> set[str]:
    graph = forward.model.graph
    names = {item.name for items in (graph.input, graph.initializer) for item in items}
    for node in graph.node:
        names.update(all_inputs(node), node.output)
    return names


def _output_shapes(forward: Prepared, loss: Iterable[str]) -> dict[str, tuple[int, ...]]:
    for name in loss:
        if name not in forward.shapes:
            raise ModelError(f"output {name!r}: its shape depends on the data; leave it out")
    return {name: forward.shapes[name] for name in loss}


def _assemble(
    g: Emitter,
    forward: Prepared,
    exposed: Iterable[str],
    losses: Losses,
    factors: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
) -> onnx.ModelProto:
    """Put forward and backward nodes together and leave out what nobody needs."""
    value = onnx.helper.make_tensor_value_info
    result = onnx.ModelProto(ir_version=forward.model.ir_version, producer_name="cobla-onnx")
    result.opset_import.extend(forward.model.opset_import)
    graph = result.graph
    graph.name = "gradient"
    nodes, read = _needed([*forward.model.graph.node, *g.nodes], outputs)
    graph.node.extend(nodes)
    declared = {item.name: item for item in forward.model.graph.input}
    graph.input.extend(declared[n] for n in dict.fromkeys([*forward.inputs, *exposed]))
    for output, target in losses.targets.items():
        graph.input.append(value(target, g.element_type, forward.shapes[output]))
        if output in losses.powers:
            graph.input.append(value(losses.powers[output], g.element_type, []))
    for name, shape in factors.items():
        graph.input.append(value(name, g.element_type, shape))
    for name, shape in outputs.items():
        graph.output.append(value(name, g.element_type, shape))
    small = [*forward.model.graph.initializer, *g.initializers]
    graph.initializer.extend(tensor for tensor in small if tensor.name in read)
    for name, tensor in forward.stored.items():
        if name in read:
            graph.initializer.append(cast_tensor(tensor, g.element_type))
    return result


def _needed(
    nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """Nodes that `outputs` depend on, in order, and all names read."""
    read = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(name for name in all_inputs(node) if name)
    return kept[::-1], read
