"""A model as onnxruntime's quantiser takes it, and what it made of that as a model of ours.

The quantiser knows nodes by their names, so that all get one; it joins an activation with what it
follows, so that tensors at which losses are taken become outputs, which it keeps. Of its result
nodes and initializers alone are taken: all else in the model is as it was.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import onnx

from cobla_onnx.arithmetic.nodes import BIAS, WEIGHTED
from cobla_onnx.graph.io.model_file import (
    add_initializers,
    copy_without_initializers,
    unique_name,
)
from cobla_onnx.graph.io.save import save_model
from cobla_onnx.graph.order import sort_nodes
from cobla_onnx.graph.protos import is_standard, unlist_weights
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.runtime.temporary import temporary_folder

__all__ = ["Handed", "Prepared", "has_more_files", "in_a_file", "prepare", "quietly"]

_TURN = threading.RLock()


@dataclass(frozen=True)
class Prepared:
    """A model for the quantiser.

    Attributes
    ----------
    original : ModelProto
    model : ModelProto
        A copy in which every node has a name of its own.
    names : tuple of str
        Of its nodes, in their order.
    given : frozenset of str
        Those of them that the original does not have.
    """

    original: onnx.ModelProto
    model: onnx.ModelProto
    names: tuple[str, ...]
    given: frozenset[str]

    def named(self, places: Collection[int]) -> list[str]:
        """Names of the nodes at the given places."""
        return [self.names[place] for place in places]

    def taken_back(self, quantised: onnx.ModelProto) -> onnx.ModelProto:
        """Put nodes and initializers of a quantised copy into the original, sorted."""
        before = {tensor.name: tensor for tensor in self.original.graph.initializer}
        result = copy_without_initializers(self.original, before)
        graph, made = result.graph, quantised.graph
        del graph.node[:]
        graph.node.extend(made.node)
        for node in graph.node:
            if node.name in self.given:
                node.name = ""
        # What the quantiser left as it was may be mapped from a file.
        graph.initializer.extend(before[t.name] for t in made.initializer if t.name in before)
        add_initializers(result, [t for t in made.initializer if t.name not in before])
        present = {t.name for t in graph.initializer}
        tensors = present.union(*(node.output for node in graph.node))
        inputs = [value for value in graph.input if value.name in before.keys() - present]
        for value in inputs:
            graph.input.remove(value)
        for value in [v for v in graph.value_info if v.name not in tensors]:
            graph.value_info.remove(value)
        for note in [n for n in graph.quantization_annotation if n.tensor_name not in tensors]:
            graph.quantization_annotation.remove(note)
        sort_nodes(graph)
        return result


def prepare(model: onnx.ModelProto, kept: Collection[onnx.ValueInfoProto] = ()) -> Prepared:
    """Copy a model for the quantiser.

    Parameters
    ----------
    kept : collection of ValueInfoProto
        Tensors that must be there afterwards.
    """
    copy = copy_without_initializers(model, ())
    unlist_weights(copy.graph)
    taken = {node.name for node in copy.graph.node}
    seen: set[str] = set()
    given = set[str]()
    for node in copy.graph.node:
        if not node.name or node.name in seen:
            node.name = unique_name(f"{node.op_type}_to_quantise", taken)
            given.add(node.name)
        seen.add(node.name)
        weighted = node.op_type in WEIGHTED and is_standard(node)
        if weighted and len(node.input) > BIAS and not node.input[BIAS]:
            # A bias that is left out by an empty name would be added all the same.
            del node.input[BIAS:]
    outputs = {value.name for value in copy.graph.output}
    copy.graph.output.extend(value for value in kept if value.name not in outputs)
    return Prepared(model, copy, tuple(node.name for node in copy.graph.node), frozenset(given))


@contextmanager
def in_a_file(model: onnx.ModelProto) -> Iterator[Path]:
    """Write a model to a temporary file, where onnxruntime's calibration reads it."""
    with temporary_folder("int8") as folder:
        path = folder / "model.onnx"
        save_model(model, path, "auto", lambda written: None)
        del model  # which may be a copy for this alone
        yield path


def has_more_files(path: Path) -> bool:
    """Whether the weights of such a file are in another beside it, since they are too large."""
    return any(file.suffix == ".data" for file in path.parent.iterdir())


class Handed:
    """Hands batches to onnxruntime's calibration, one at a time."""

    def __init__(self, batches: Iterable[Feeds]) -> None:
        self._batches: Iterator[Feeds] = iter(batches)

    def get_next(self) -> Feeds | None:
        """Return the next batch, None after the last."""
        return next(self._batches, None)


class _Muted:
    """A stream that takes nothing from one thread, and passes on what others write."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        """Return how many characters were taken."""
        if threading.get_ident() != self._thread and self._stream is not None:
            self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what onnxruntime's quantiser prints and logs from the terminal.

    Output and loggers are those of the process, so that threads take turns; what others than this
    one print and log passes meanwhile.
    """
    with _TURN:
        thread, silent = threading.get_ident(), logging.NullHandler()
        root, theirs = logging.getLogger(), logging.getLogger("onnxruntime")
        level, muted = theirs.level, cast("TextIO", _Muted(sys.stdout, thread))

        def is_of_others(record: logging.LogRecord) -> bool:
            return record.thread != thread

        # Without any handler, the first message would install one that stays.
        root.addHandler(silent)
        root.addFilter(is_of_others)
        theirs.setLevel(logging.CRITICAL)
        try:
            with redirect_stdout(muted):
                yield
        finally:
            theirs.setLevel(level)
            root.removeFilter(is_of_others)
            root.removeHandler(silent)
