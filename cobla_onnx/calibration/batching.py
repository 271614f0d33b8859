"""Choose the batch size: as large as memory allows, or 1 where a model mixes its samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import onnx

from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.evaluation.deviation import rounding_error
from cobla_onnx.errors import ModelError
from cobla_onnx.graph.io.model_file import copy_without_initializers, stored_bytes
from cobla_onnx.graph.layers import Layer, all_inputs
from cobla_onnx.runtime.session import BY_FILE, Feeds, open_session, run_session
from cobla_onnx.runtime.temporary import temporary_folder
from cobla_onnx.text import quoted

__all__ = [
    "MEMORY",
    "Batching",
    "RunSizes",
    "TapLimit",
    "choose_batching",
    "mixes_samples",
    "run_sizes",
]

Item = TypeVar("Item")

# Most bytes that a run of the package takes in addition to the model, by default.
MEMORY = 2_000_000_000
# Bytes of Python and its libraries, and of everything that does not grow with the samples, such as
# chunks of vectors in double precision.
PROCESS = 600_000_000
# Number of copies of the weights: the model's, and those of factors and of parts of it.
COPIES = 2
# Copies for each unit of work, where they are not mapped from a file: a session holds the weights
# once, and while it is opened twice. As many units as that run at a time on any machine.
SESSION_COPIES, UNITS = 2, 2
# Bytes for each byte of a compared output, in double precision, where a sample of it is larger
# than the chunk that is compared at a time.
COMPARED, CHUNK = 12, 1 << 24
MOST_AT_ONCE = 16
# Sessions that are open at the same time, most of them idle.
SESSIONS = 8
# Bytes of second moments that are accumulated at a time even where there is no room.
LEAST_SUMS = 1 << 25
# Largest difference between samples run alone and together, relative to the largest output.
ROUNDING = {np.dtype(np.float16): 3e-2, np.dtype(np.float32): 1e-3, np.dtype(np.float64): 1e-6}
# Fraction of integers, such as classes, that rounding may change.
CHANGED = 0.02


@dataclass(frozen=True)
class RunSizes:
    """Bytes of a model's tensors in a run of one sample.

    Attributes
    ----------
    peak : int
        Most bytes held at the same time, if each tensor is freed after its last reader.
    total : int
        Bytes of all tensors, which a gradient needs.
    tensors : dict of str to int
        Bytes of the tensors of the main graph, by name, with inputs and without weights.
    """

    peak: int
    total: int
    tensors: Mapping[str, int]


@dataclass(frozen=True)
class TapLimit:
    """Limit on the bytes read from one run of a model; more tensors take several runs.

    Attributes
    ----------
    most : int
        Most bytes of tensors that are read from one run.
    tensors : dict of str to int
        Bytes of each tensor.
    """

    most: int
    tensors: Mapping[str, int]

    def cut(
        self, items: Iterable[Item], read: Callable[[Item], str], times: int = 1
    ) -> list[list[Item]]:
        """Split items, in their order, into groups that each stay within the limit.

        Parameters
        ----------
        read : callable
            Name of the tensor that an item reads. A tensor over the limit is a group of its own.
        times : int
            Tensors of this size that are read for each name.
        """
        groups: list[list[Item]] = []
        names: set[str] = set()
        for item in items:
            names.add(read(item))
            size = times * sum(self.tensors.get(name, 0) for name in names)
            if not groups or (size > self.most and len(names) > 1):
                groups.append([])
                names = {read(item)}
            groups[-1].append(item)
        return groups


@dataclass(frozen=True)
class Batching:
    """How samples are run.

    Attributes
    ----------
    size : int
        Samples in a run (batch size); depends on model, data and limit alone.
    at_once : int
        Number of such runs that fit in memory at once; results do not depend on it.
    sums : int
        Bytes of second moments accumulated at a time, half of them by one unit of work.
    taps : TapLimit
        Limits the tensors that are read from such a run.
    gives_back : bool
        Whether sessions free the memory of a run, so that idle ones hold nothing.
    notes : tuple of str
    """

    size: int
    at_once: int
    sums: int
    taps: TapLimit
    gives_back: bool
    notes: tuple[str, ...] = ()


def choose_batching(
    model: onnx.ModelProto,
    measured: onnx.ModelProto,
    layers: Sequence[Layer],
    dataset: Dataset,
    batch: Literal["auto"] | int,
    limit: int | None,
    *,
    threads: int,
    gradient: bool = False,
) -> Batching:
    """Choose the batch size, from runs of one sample and of two.

    One run, with the tensors that are read from it, gets a third of the room; tensors of a single
    sample that exceed it are read in several runs. The room is the limit less the process itself
    and copies of the weights, those of two sessions at a time among them. It never depends on the
    machine's free memory, so that batches are the same everywhere.

    Parameters
    ----------
    model, measured : ModelProto
        The model that is run, and the same with the tensors where the loss is taken as outputs.
    layers : sequence of Layer
        Layers whose inputs and outputs are read.
    batch : 'auto' or int
        A number is used as it is.
    limit : int, optional
        Most bytes that the process may take; by default `MEMORY` more than the model.
    gradient : bool
        Whether gradients are computed, which keep all tensors.
    """
    one, two = dataset.examples()
    sizes = run_sizes(model, next(dataset.batches([one], 1)), threads)
    weights = stored_bytes(model)
    outputs = [sizes.tensors.get(value.name, 0) for value in measured.graph.output]
    fixed = PROCESS + COPIES * weights + COMPARED * max([0, *(n - CHUNK for n in outputs)])
    # Sessions map weights that they get in a file.
    session = 0 if weights >= BY_FILE else SESSION_COPIES * weights
    beside = (weights + MEMORY if limit is None else limit) - fixed
    room = max(beside - UNITS * session, 0)
    share = room // 3
    inputs, made = _tensors(layers, sizes)
    # Tensors that are read exist twice: in onnxruntime and in numpy.
    taps = max(*inputs, *made, min(sum(inputs), (share - sizes.peak) // 2), 0)
    each = max(sizes.peak + 2 * taps, 2 * sizes.total if gradient else 0, 1)
    notes: list[str] = []
    if batch != "auto":
        size = batch
    else:
        size = max(1, min(MOST_AT_ONCE, share // each))
        mixed = "" if two is None or size == 1 else mixes_samples(measured, dataset, *two, threads)
        if mixed:
            size = 1
            notes.append(f"samples run one at a time: {mixed}")
    if each > beside - session:
        needed = fixed + session + each
        notes.append(
            f"--memory-limit is below what a run takes, about {needed / 1e9:.1f} GB, "
            f"{each / 1e6:.3g} MB of it for one sample"
        )
    at_once = max(1, 2 * beside // (3 * size * each + 2 * session))
    return Batching(
        size,
        at_once,
        max(share, LEAST_SUMS),
        TapLimit(size * taps, {name: size * each for name, each in sizes.tensors.items()}),
        SESSIONS * size * sizes.peak > share,
        tuple(notes),
    )


def _tensors(layers: Sequence[Layer], sizes: RunSizes) -> tuple[list[int], list[int]]:
    """Bytes of the inputs and outputs of layers, with an extra 0 for models without layers."""
    uses = [use for layer in layers for use in layer.uses]
    read = {use.data for use in uses}, {use.output for use in uses}
    inputs, outputs = ([0, *(sizes.tensors.get(name, 0) for name in names)] for names in read)
    return inputs, outputs


def run_sizes(model: onnx.ModelProto, feeds: Feeds, threads: int) -> RunSizes:
    """Measure the tensors of one run, by onnxruntime's profile of it.

    Raises
    ------
    ModelError
        If the model does not load or run.
    """
    named = copy_without_initializers(model, ())
    for number, node in enumerate(named.graph.node):
        node.name = f"node/{number}"
    sizes = {name: array.nbytes for name, array in feeds.items()}
    with temporary_folder("profile") as folder:
        for event in _profile(named, feeds, threads, folder):
            place, _, kind = event["name"].rpartition("_kernel_")
            number = place.removeprefix("node/")
            if kind == "time" and number.isdecimal() and place != number:
                node = named.graph.node[int(number)]
                sizes |= _output_sizes([name for name in node.output if name], event["args"])
    return RunSizes(_peak(named.graph, sizes), sum(sizes.values()), sizes)


def _profile(
    model: onnx.ModelProto, feeds: Feeds, threads: int, folder: Path
) -> Iterator[dict[str, Any]]:
    """Run a model once; yield what onnxruntime's profile, a file in the folder, says of nodes."""
    session = open_session(model, threads, profile=str(folder / "run"))
    run_session(session, feeds)
    with Path(session.end_profiling()).open(encoding="utf-8") as lines:
        # One event per line: those of a loop may be too many to hold at once.
        for line in lines:
            text = line.strip().rstrip(",")
            if text.startswith("{"):
                event = json.loads(text)
                if event.get("cat") == "Node":
                    yield event


def _output_sizes(names: Sequence[str], event: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of a node's outputs; where shapes are unknown, all bytes count for the first."""
    shapes = event.get("output_type_shape", ())
    if len(shapes) != len(names):
        return dict(zip(names, [int(event.get("output_size", 0))], strict=False))
    return {
        name: int(np.prod(shape, dtype=np.int64)) * _item_size(kind)
        for name, entry in zip(names, shapes, strict=True)
        for kind, shape in entry.items()
    }


def _item_size(kind: str) -> int:
    try:
        return np.dtype({"float": "float32", "double": "float64"}.get(kind, kind)).itemsize
    except TypeError:
        # A type that numpy does not have takes at most two bytes.
        return 2


def _peak(graph: onnx.GraphProto, sizes: Mapping[str, int]) -> int:
    last = {name: number for number, node in enumerate(graph.node) for name in all_inputs(node)}
    last |= dict.fromkeys((value.name for value in graph.output), len(graph.node))
    held = sum(sizes.get(value.name, 0) for value in graph.input)
    peak = held
    for number, node in enumerate(graph.node):
        held += sum(sizes.get(name, 0) for name in node.output)
        peak = max(peak, held)
        over = {n for n in (*all_inputs(node), *node.output) if last.get(n, number) == number}
        held -= sum(sizes.get(name, 0) for name in over)
    return peak


def mixes_samples(
    model: onnx.ModelProto, dataset: Dataset, one: int, two: int, threads: int
) -> str:
    """Run two samples alone and together; return why they must not be batched, or an empty text.

    The outputs of a random model always differ, so that nothing follows for it.

    Raises
    ------
    ModelError
        If a sample does not run alone.
    """
    session = open_session(model, threads, optimized=True)
    feeds = [next(dataset.batches([index], 1)) for index in (one, two)]
    alone = [run_session(session, given) for given in feeds]
    try:
        together = run_session(session, next(dataset.batches([one, two], 2)))
    except ModelError:
        return "two together do not run, since the model has a batch of one written into it"
    for name, found in together.items():
        parts = [values[name] for values in alone]
        if _are_both(found, parts) or all(_alike(found, part) for part in parts):
            continue
        if _alike(run_session(session, feeds[0])[name], parts[0]):
            return f"output {quoted(name)} of two together is not what each gives alone"
    return ""


def _are_both(found: Any, parts: Sequence[Any]) -> bool:
    """Whether a batched output is the two single outputs, concatenated along the first axis."""
    arrays = all(isinstance(value, np.ndarray) and value.ndim for value in parts)
    if not arrays or len({value.shape[1:] for value in parts}) > 1:
        return False
    return _alike(found, np.concatenate(parts))


def _alike(found: Any, expected: Any) -> bool:
    """Whether two outputs are equal up to rounding."""
    if not isinstance(found, np.ndarray) or not isinstance(expected, np.ndarray):
        return False
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if found.dtype.kind != "f":
        return not found.size or float((found != expected).mean()) <= CHANGED
    return rounding_error(expected, found) <= ROUNDING.get(found.dtype, 3e-2)
