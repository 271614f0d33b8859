"""Trace an output back to the nearest tensors that can be compared numerically.

Such a tensor is of floating type, has a shape that follows from the inputs' shapes, and depends
smoothly on the weights of some layer. Most of this follows from the graph; a few runs show the
rest, which is types that inference does not give, and computed sizes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from cobla_onnx.graph.layers import Layer, all_inputs, outputs_of
from cobla_onnx.graph.macs import infer_tensors
from cobla_onnx.graph.protos import STORED_TYPES
from cobla_onnx.graph.subgraph import reached_from
from cobla_onnx.graph.varying import Varying, varying_tensors
from cobla_onnx.runtime.session import Feeds, open_session, run_session

__all__ = ["FLOATING", "Tracing", "without_repetition"]

FLOATING = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(double)": onnx.TensorProto.DOUBLE,
}
# Stands for the type of a value that is not a tensor.
OTHER = -1
# Operators whose results change in steps.
STEPS = {
    "ArgMax",
    "ArgMin",
    "Ceil",
    "Equal",
    "Floor",
    "Greater",
    "GreaterOrEqual",
    "Hardmax",
    "IsInf",
    "IsNaN",
    "Less",
    "LessOrEqual",
    "NonMaxSuppression",
    "NonZero",
    "Round",
    "Shape",
    "Sign",
    "Size",
}
# Operators that encode numbers as integers.
QUANTISING = ("Quantize", "QLinear", "Integer", "QGemm", "QAttention")
# Operators whose result determines their one varying input, or the part of it that matters.
KEEPING = {
    "Cast",
    "Concat",
    "Exp",
    "Flatten",
    "Identity",
    "Log",
    "LogSoftmax",
    "Neg",
    "Normalizer",
    "Reshape",
    "Sigmoid",
    "Softmax",
    "Squeeze",
    "Tanh",
    "Transpose",
    "Unsqueeze",
}
# One of the two inputs must be constant.
KEEPING_WITH_CONSTANT = {"Add", "Div", "Mul", "Sub"}
# Most times that the result of runs may change the answer.
ROUNDS = 8


class Tracing:
    """A graph and the facts about its tensors, searched backwards from an output.

    Parameters
    ----------
    model : ModelProto
        Its nodes are in topological order.
    layers : sequence of Layer
        Layers whose weights may change; without any, the inputs take the place of their outputs.
    examples : sequence of dict
        Single samples.
    declared : mapping of str to str
        onnxruntime's name for the type of every output.
    threads : int

    Attributes
    ----------
    types : dict of str to int
        TensorProto data types; `OTHER` for values that are not tensors.
    depends, smooth : set of str
        Tensors that depend on some layer, and those that do so smoothly, not only in steps.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        examples: Sequence[Feeds],
        declared: Mapping[str, str],
        threads: int,
    ) -> None:
        self.model, self.declared = model, declared
        self._examples, self._threads = examples, threads
        nodes = model.graph.node
        self.producer = {name: node for node in nodes for name in node.output if name}
        self._given = {name: value.shape for name, value in (examples or [{}])[0].items()}
        shapes, self.types = infer_tensors(model, dict(self._given))
        for name, kind in declared.items():
            if kind in FLOATING or not self.types.get(name):
                self.types[name] = FLOATING.get(kind, OTHER)
        self.varying: Varying = varying_tensors(model, shapes)
        made = {name for layer in layers for name in outputs_of(model, layer)}
        self._roots = made or set(self._given)
        self.depends = reached_from(model, self._roots)
        self._changing: set[str] = set()
        self._unknown: set[str] = set()

    def settled(self, outputs: Sequence[str]) -> dict[str, list[str]]:
        """For each output the tensors to measure, using the results of runs."""
        self._look({name for name in outputs if self._may_vary(name)})
        for _ in range(ROUNDS):
            self.smooth = self._find_smooth()
            self._unknown = set()
            sources = {name: self._sources(name) for name in outputs}
            if self._unknown:
                self._learn(sorted(self._unknown))
                continue
            inner = {name for names in sources.values() for name in names} - set(outputs)
            if not (self._changing and self._look(inner)):
                break
        return sources

    def varies(self, name: str) -> bool:
        """Whether the shape of a tensor depends on the data."""
        if name in self.varying.certain or name in self._changing:
            return True
        # Sizes computed from data need not vary: only samples can show that they do.
        return bool(self._changing) and name in self.varying.possible

    def measurable(self, name: str) -> bool:
        """Whether a tensor can be compared number by number."""
        known = self.types.get(name) in FLOATING.values()
        return name in self.smooth and known and not self.varies(name)

    def _may_vary(self, name: str) -> bool:
        return name in self.varying.possible and name not in self.varying.certain

    def _find_smooth(self) -> set[str]:
        """Tensors that depend on some weight, and not only in steps."""
        smooth = set(self._roots)
        for node in self.model.graph.node:
            moved = smooth.intersection(all_inputs(node))
            if not moved or node.op_type in STEPS:
                continue
            stands_for = any(part in node.op_type for part in QUANTISING)
            stands_for = stands_for or any(self._is_integer(name) for name in moved)
            for name in node.output:
                if name and (stands_for or not self._is_integer(name)):
                    smooth.add(name)
        return smooth

    def _is_integer(self, name: str) -> bool:
        kind = self.types.get(name, 0)
        return kind not in (*STORED_TYPES, OTHER, 0)

    def _sources(self, output: str) -> list[str]:
        """Nearest tensors before an output that can be measured; the output itself, if it can."""
        found, seen, pending = [], set(), [output]
        while pending:
            name = pending.pop(0)
            if not name or name in seen or name not in self.depends:
                continue
            seen.add(name)
            if name in self.smooth and not self.types.get(name):
                self._unknown.add(name)
            if self.measurable(name):
                found.append(name)
            elif name in self.producer:
                pending.extend(all_inputs(self.producer[name]))
        return found

    def _learn(self, names: Sequence[str]) -> None:
        """Read the types that inference does not give from one run."""
        self.types |= dict.fromkeys(names, OTHER)
        for _, values in self._runs(names, self._examples[:1]):
            for name in names:
                if isinstance(values[name], np.ndarray):
                    dtype = values[name].dtype
                    self.types[name] = onnx.helper.np_dtype_to_tensor_dtype(dtype)

    def _look(self, names: Collection[str]) -> bool:
        """Find in a few runs which shapes vary while those of the inputs do not; return if any."""
        seen: dict[Any, Any] = {}
        before = len(self._changing)
        for feeds, values in self._runs(sorted(names), self._examples):
            given = tuple((name, feeds[name].shape) for name in sorted(feeds))
            for name in names:
                shape = getattr(values[name], "shape", None)
                if seen.setdefault((name, given), shape) != shape:
                    self._changing.add(name)
        return len(self._changing) > before

    def _runs(
        self, names: Sequence[str], examples: Sequence[Feeds]
    ) -> Iterator[tuple[Feeds, Mapping[str, Any]]]:
        if names:
            session = open_session(self.model, self._threads, names, optimized=True)
            for feeds in examples:
                yield feeds, run_session(session, feeds)

    def kept_by(self, name: str) -> set[str]:
        """Tensors before `name` that are determined by it, as far as they matter."""
        found: set[str] = set()
        pending = [name]
        while pending:
            node = self.producer.get(pending.pop())
            if node is None or not self._keeps(node):
                continue
            moved = self.smooth.intersection(node.input) - found
            found |= moved
            pending.extend(moved)
        return found

    def _keeps(self, node: onnx.NodeProto) -> bool:
        if node.op_type in KEEPING:
            return True
        moved = [name for name in node.input if name in self.depends]
        return node.op_type in KEEPING_WITH_CONSTANT and len(moved) == 1

    def follows_from(self, name: str, others: Collection[str]) -> bool:
        """Whether a tensor is computed from `others` without another layer in between."""
        pending, seen = [name], set()
        while pending:
            current = pending.pop()
            if current in seen or current not in self.depends:
                continue
            seen.add(current)
            if current != name and current in others:
                continue
            if current in self._roots or current not in self.producer:
                return False
            pending.extend(all_inputs(self.producer[current]))
        return True


def without_repetition(
    search: Tracing, outputs: Sequence[str], sources: Mapping[str, Sequence[str]]
) -> set[str]:
    """Leave out tensors of an output that carry nothing beyond the others."""
    own = {name for name in outputs if list(sources[name]) == [name]}
    chosen = {name for names in sources.values() for name in names}
    order = {name: place for place, name in enumerate(search.producer)}
    for name in sorted(chosen - own, key=lambda name: order.get(name, -1)):
        if any(name in search.kept_by(other) for other in chosen - {name}):
            chosen.discard(name)
    for name in sorted(chosen - own, key=lambda name: -order.get(name, -1)):
        if search.follows_from(name, chosen - {name}):
            chosen.discard(name)
    return chosen
