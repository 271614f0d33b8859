"""A copy of the model whose outputs are the tensors at which the loss is taken.

Not every output can be compared number by number: a list of boxes differs in length from image
to image, a label changes in steps, a weight never changes. Such an output is traced back to the
nearest tensors that can be compared: of floating type, with a shape that follows from the
inputs' shapes, and depending smoothly on the weights of some layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from cobla_onnx.calibration.evaluation.tracing import FLOATING, Tracing, without_repetition
from cobla_onnx.errors import DataError
from cobla_onnx.graph.io.model_file import copy_without_initializers
from cobla_onnx.graph.layers import Layer, all_inputs, node_label, outputs_of
from cobla_onnx.runtime.session import Feeds, open_session
from cobla_onnx.text import quoted
from cobla_onnx.wording import option_name

__all__ = ["MeasuredModel", "measured_model"]


@dataclass(frozen=True)
class MeasuredModel:
    """Where the loss is taken.

    Attributes
    ----------
    model : ModelProto
        Its outputs are the measured tensors, all with a type. Its nodes are those of the
        original, except that nodes not needed for these outputs are constants. It is the
        original itself if nothing has to change.
    outputs : dict of str to str
        For each measured tensor, the output of the original that it represents.
    notes : tuple of str
        Say which tensors are measured in place of which outputs.
    unmeasured : tuple of str
        Names of layers that change an output that counts, but no measured tensor.
    """

    model: onnx.ModelProto
    outputs: dict[str, str]
    notes: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ()

    def shown(self, name: str) -> str:
        """Name for the report: the user's output, if this tensor alone represents it."""
        output = self.outputs.get(name, name)
        return output if list(self.outputs.values()).count(output) == 1 else name


def measured_model(
    model: onnx.ModelProto,
    layers: Sequence[Layer],
    examples: Sequence[Feeds],
    *,
    ignored: Collection[str] = frozenset(),
    threads: int = 1,
) -> MeasuredModel:
    """Choose the tensors at which the loss is taken, and make them the outputs of a model.

    Parameters
    ----------
    model : ModelProto
        Its nodes are in topological order; it is not changed.
    layers : sequence of Layer
        Layers whose weights may change. Without any, all tensors that depend on the inputs can
        be measured.
    examples : sequence of dict
        A few single samples, which decide where the graph does not.
    ignored : collection of str
        Outputs that do not count.

    Raises
    ------
    ModelError
        If the model does not load.
    DataError
        If no tensor can be measured.
    """
    session = open_session(model, threads, optimized=True)
    declared = {value.name: value.type for value in session.get_outputs()}
    del session
    wanted = [value.name for value in model.graph.output if value.name not in ignored]
    search = Tracing(model, layers, examples, declared, threads)
    sources = search.settled(wanted)
    chosen = without_repetition(search, wanted, sources)
    if not chosen:
        raise DataError(_refusal(search, wanted, ignored))
    outputs: dict[str, str] = {}
    for output in wanted:
        for name in sources[output]:
            if name in chosen:
                outputs.setdefault(name, output)
    return MeasuredModel(
        _with_outputs(model, layers, {name: search.types[name] for name in outputs}),
        outputs,
        tuple(_notes(search, wanted, sources, outputs)),
        _unmeasured(model, layers, wanted, outputs),
    )


def _reason(search: Tracing, output: str) -> str:
    """Reason why an output cannot be measured itself."""
    if output not in search.depends:
        return "no layer that is looked at changes it"
    if search.types[output] not in FLOATING.values():
        kind = search.declared[output].removeprefix("tensor(").removesuffix(")")
        return f"holds {kind if 'tensor' not in kind else 'no single tensor'}"
    if search.varies(output):
        cause = search.varying.cause(output)
        made = ""
        if cause is not None:
            node = search.model.graph.node[cause]
            made = f" (node {quoted(node_label(node, cause))}, {node.op_type})"
        return f"has a shape that depends on the data{made}"
    return "changes in steps"


def _notes(
    search: Tracing,
    outputs: Sequence[str],
    sources: Mapping[str, Sequence[str]],
    measured: Mapping[str, str],
) -> Iterable[str]:
    groups: dict[str, list[str]] = {}
    for output in outputs:
        if output in measured:
            continue
        names = [name for name in sources[output] if name in measured]
        if names:
            what = "the loss is taken at " + _list(names)
        elif sources[output]:
            what = "what it is made of is measured already"
        else:
            what = "it does not count in the loss"
        groups.setdefault(f"{_reason(search, output)}: {what}", []).append(output)
    for text, names in groups.items():
        yield f"{'output' if len(names) == 1 else 'outputs'} {_list(names)}: {text}"


def _list(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(quoted(name) for name in names[:most]) + more


def _refusal(search: Tracing, outputs: Sequence[str], ignored: Collection[str]) -> str:
    reasons = [f"{quoted(name)} {_reason(search, name)}" for name in outputs[:6]]
    if ignored:
        reasons.append(f"{_list(sorted(ignored))} left out by option")
    return (
        f"no output can be compared with the original's: {'; '.join(reasons) or 'there is none'}; "
        f"let another output count by {option_name('outputs')}, or leave out {option_name('data')}"
    )


def _unmeasured(
    model: onnx.ModelProto, layers: Sequence[Layer], outputs: Iterable[str], measured: Iterable[str]
) -> tuple[str, ...]:
    counted, seen = (_behind(model, names)[0] for names in (outputs, measured))
    found = []
    for layer in layers:
        made = set(outputs_of(model, layer))
        if made & counted and not made & seen:
            found.append(layer.name)
    return tuple(found)


def _behind(model: onnx.ModelProto, names: Iterable[str]) -> tuple[set[str], set[int]]:
    """Tensors from which `names` are computed, these included, and the nodes on the way."""
    needed, nodes = set(names), set()
    for index in reversed(range(len(model.graph.node))):
        node = model.graph.node[index]
        if not needed.isdisjoint(node.output):
            nodes.add(index)
            needed.update(name for name in all_inputs(node) if name)
    return needed, nodes


def _with_outputs(
    model: onnx.ModelProto, layers: Sequence[Layer], types: Mapping[str, int]
) -> onnx.ModelProto:
    """Copy a model with other outputs; nodes keep their places, which layers refer to."""
    declared = {value.name: value for value in model.graph.output}
    typed = [declared[n] for n in types if n in declared and declared[n].type.tensor_type.elem_type]
    if len(typed) == len(types) == len(declared):
        return model
    result = copy_without_initializers(model, ())
    graph = result.graph
    del graph.output[:]
    for name, kind in types.items():
        value = declared.get(name)
        if value is None or not value.type.tensor_type.elem_type:
            value = onnx.helper.make_tensor_value_info(name, kind, None)
        graph.output.append(value)
    made = [name for layer in layers for name in outputs_of(model, layer)]
    _, needed = _behind(model, [*types, *made])
    _replace_idle(graph, lambda index: index not in needed)
    return result


def _replace_idle(graph: onnx.GraphProto, idle: Callable[[int], bool]) -> None:
    """Turn unneeded nodes into constants, which cost nothing and cannot fail."""
    gone: set[str] = set()
    for index, node in enumerate(graph.node):
        names = [name for name in node.output if name]
        if idle(index) and names:
            gone.update(names)
            nothing = onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [0.0])
            node.CopyFrom(
                onnx.helper.make_node("Constant", [], names[:1], node.name, value=nothing)
            )
    kept = [value for value in graph.value_info if value.name not in gone]
    del graph.value_info[:]
    graph.value_info.extend(kept)
