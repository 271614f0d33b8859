"""Run the original and the compressed model in onnxruntime and compare them.

Two different questions are asked. Is the rewrite right: does each pair of factor nodes
compute what the original node computes with the same approximated dense weight, up to
float rounding? And how good is the approximation: how far are the compressed model's
outputs from the original's? The first has one right answer, the second is a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError, VerificationError
from cobla_onnx.graph.cost import Shape
from cobla_onnx.graph.model_file import copy_without_initializers, tensor_bytes
from cobla_onnx.rewrite import Replacement

__all__ = [
    "Feeds",
    "OutputComparison",
    "Verification",
    "check_model",
    "measured_shapes",
    "open_session",
    "random_feeds",
    "verify",
]

Feeds: TypeAlias = "dict[str, NDArray[Any]]"
# Float rounding of one layer, relative to its largest output, by its type.
ROUNDING = {np.dtype(np.float16): 2e-2, np.dtype(np.float32): 1e-4, np.dtype(np.float64): 1e-10}
# The same after a whole network, which amplifies it.
AMPLIFICATION = 30.0
SIZES_TO_TRY = (16, 64, 224, 1)


@dataclass(frozen=True)
class OutputComparison:
    """One output of the compressed model against the original's.

    Attributes
    ----------
    name : str
    max_abs : float
        Largest absolute difference.
    relative_l2 : float
        Norm of the difference over the norm of the original.
    cosine : float
        Cosine of the angle between the two; 1 is the same direction.
    sqnr_db : float or None
        Signal to quantisation noise, 20 log10(norm / norm of difference); None if equal.
    argmax_agreement : float or None
        Share of samples with the same largest entry along axis 1, None if there is none.
    """

    name: str
    max_abs: float
    relative_l2: float
    cosine: float
    sqnr_db: float | None
    argmax_agreement: float | None


@dataclass(frozen=True)
class Verification:
    """What was verified, on which data, and how it came out.

    Attributes
    ----------
    data : str
        Where the inputs came from; ``random`` says little about real data.
    samples : int
    rewrite_max_error : float
        Largest difference between a layer's factor nodes and its node with the same
        dense weight, relative to the layer's largest output.
    network_error : float
        The same for the model's outputs, as relative L2 norm.
    outputs : tuple of OutputComparison
    notes : tuple of str
    """

    data: str
    samples: int
    rewrite_max_error: float
    network_error: float
    outputs: tuple[OutputComparison, ...]
    notes: tuple[str, ...] = ()


def open_session(
    model: onnx.ModelProto,
    threads: int,
    extra_outputs: Sequence[str] = (),
    extra_weights: Mapping[str, NDArray[Any]] | None = None,
) -> onnxruntime.InferenceSession:
    """Open a model in onnxruntime on the CPU, without serialising its weights.

    Graph optimisations are off, so that two models are compared at the same level.
    `extra_weights` are initializers beside those that the model holds.

    Raises
    ------
    ModelError
        If onnxruntime does not load the model.
    """
    large = [
        t
        for t in model.graph.initializer
        if tensor_bytes(t) > 1024 and t.data_type != onnx.TensorProto.STRING
    ]
    light = copy_without_initializers(model, {t.name for t in large})
    names: list[str] = []
    values: list[Any] = []

    def hand_over(name: str, data_type: int, array: NDArray[Any]) -> None:
        stub = light.graph.initializer.add(
            name=name,
            data_type=data_type,
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        stub.external_data.add(key="location", value="held in memory")
        contiguous = np.ascontiguousarray(array)
        names.append(name)
        values.append(
            onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous, data_type)
        )

    for tensor in large:
        try:
            array = onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"initializer {tensor.name!r}: its data does not fit its shape "
                f"{list(tensor.dims)}; the file is damaged, export or download it again"
            ) from error
        hand_over(tensor.name, tensor.data_type, array)
    for name, array in (extra_weights or {}).items():
        hand_over(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array)
    present = {value.name for value in light.graph.output}
    for name in extra_outputs:
        if name not in present:
            light.graph.output.add(name=name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    if names:
        options.add_external_initializers(names, values)
    try:
        return onnxruntime.InferenceSession(
            light.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ModelError(
            f"onnxruntime {onnxruntime.__version__} cannot load the model: {_first_line(error)}; "
            "check the file with onnx.checker, or update onnxruntime"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def _run(session: onnxruntime.InferenceSession, feeds: Feeds) -> dict[str, Any]:
    names = [output.name for output in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, feeds), strict=True))
    except Exception as error:
        raise ModelError(
            f"onnxruntime cannot run the model on inputs of shapes "
            f"{ {name: list(value.shape) for name, value in feeds.items()} }: "
            f"{_first_line(error)}; give shapes that it accepts by --input-shape"
        ) from error


def random_feeds(
    session: onnxruntime.InferenceSession,
    shapes: Mapping[str, Shape],
    seed: int,
    batch: int = 1,
    unknown: int = SIZES_TO_TRY[0],
) -> Feeds:
    """Draw inputs that fit the types and shapes of a model's inputs.

    Floats are standard normal, integers 0 or 1 (valid as token, index and mask), each
    from `seed`. A symbolic first axis becomes `batch`, other unknown axes `unknown`.

    Raises
    ------
    ModelError
        If an input is of a type that cannot be drawn, such as a string or a sequence.
    """
    generator = np.random.default_rng(seed)
    feeds: Feeds = {}
    for value in session.get_inputs():
        declared = list(value.shape)
        known = list(shapes.get(value.name) or [None] * len(declared))
        for axis, size in enumerate(known):
            if axis == 0 and not isinstance(declared[0], int) and size in (None, 1):
                known[0] = batch
            elif size is None:
                known[axis] = unknown
        sizes = [int(size) for size in known if size is not None]
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        if kind in ("float", "float16", "double"):
            dtype = {"float": "float32", "float16": "float16", "double": "float64"}[kind]
            feeds[value.name] = generator.standard_normal(sizes).astype(dtype)
        elif kind == "bool" or kind.lstrip("u").startswith("int"):
            feeds[value.name] = generator.integers(0, 2, sizes).astype(kind)
        else:
            raise ModelError(f"input {value.name!r}: cannot make random values of {value.type}")
    return feeds


def _runnable_feeds(
    session: onnxruntime.InferenceSession, shapes: Mapping[str, Shape], seed: int
) -> tuple[list[Feeds], list[dict[str, Any]], int]:
    """Find sizes for unknown axes that the model accepts; return inputs and outputs."""
    failure: ModelError | None = None
    for unknown in SIZES_TO_TRY:
        try:
            feeds = [random_feeds(session, shapes, seed, 1, unknown)]
            results = [_run(session, feeds[0])]
        except ModelError as error:
            failure = failure or error
            if all(None not in (shape or (None,)) for shape in shapes.values()):
                break
            continue
        more = random_feeds(session, shapes, seed + 1, 3, unknown)
        try:
            results.append(_run(session, more))
            feeds.append(more)
        except ModelError:
            # Many a graph has the batch written into a Reshape: one sample must do.
            pass
        return feeds, results, unknown
    assert failure is not None
    raise failure


def measured_shapes(
    model: onnx.ModelProto,
    names: Sequence[str],
    shapes: Mapping[str, Shape],
    threads: int,
) -> dict[str, Shape]:
    """Read the shapes of the tensors `names` from one run in onnxruntime.

    For models with operators that ONNX's shape inference does not know. All input shapes
    must be known.
    """
    session = open_session(model, threads, extra_outputs=names)
    results = _run(session, random_feeds(session, shapes, seed=0))
    return {name: tuple(results[name].shape) for name in names}


def check_model(original: onnx.ModelProto, compressed: onnx.ModelProto) -> tuple[str, ...]:
    """Run the ONNX checker on the compressed model.

    Returns
    -------
    tuple of str
        A note, where the original does not pass either (it may use operators that only
        onnxruntime knows).

    Raises
    ------
    VerificationError
        If the compressed model fails where the original passes.
    """
    try:
        onnx.checker.check_model(compressed)
    except onnx.checker.ValidationError as error:
        try:
            onnx.checker.check_model(original)
        except onnx.checker.ValidationError as before:
            return (f"the ONNX checker rejects the original too: {_first_line(before)}",)
        raise VerificationError(
            f"the rewritten model does not pass the ONNX checker: {_first_line(error)}; "
            "nothing was written, please report this"
        ) from error
    return ()


def verify(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Sequence[Replacement],
    shapes: Mapping[str, Shape],
    *,
    seed: int = 0,
    threads: int = 1,
) -> Verification:
    """Prove the rewrite and measure the approximation, on random inputs.

    Parameters
    ----------
    shapes : mapping of str to tuple
        Shapes of the model's inputs as far as they are known.

    Raises
    ------
    ModelError
        If the original does not load or run.
    VerificationError
        If the checker or onnxruntime rejects the compressed model, or the factor nodes do
        not compute what their dense weight would.
    """
    notes = check_model(original, compressed)
    session = open_session(original, threads)
    feeds, reference, unknown = _runnable_feeds(session, shapes, seed)
    if any(None in (shape or (None,)) for shape in shapes.values()):
        notes += (f"unknown input axes were set to {unknown} for verification",)
    del session
    try:
        session = open_session(compressed, threads)
        results = [_run(session, feed) for feed in feeds]
    except ModelError as error:
        raise VerificationError(f"the rewritten model fails: {error}; nothing written") from error
    del session
    rewrite_error, dense = _check_layers(original, compressed, replacements, feeds, threads)
    network_error = _check_network(dense, results)
    outputs = tuple(
        _compare(name, [r[name] for r in reference], [r[name] for r in results])
        for name in reference[0]
        if _is_numeric(reference[0][name])
    )
    samples = sum(_samples(feed) for feed in feeds)
    return Verification("random", samples, rewrite_error, network_error, outputs, notes)


def _samples(feed: Feeds) -> int:
    return max((len(value) if value.ndim else 1 for value in feed.values()), default=1)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.size > 0


def _check_layers(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Sequence[Replacement],
    feeds: Sequence[Feeds],
    threads: int,
) -> tuple[float, list[dict[str, Any]]]:
    """Compare each pair of factor nodes with its node under the same dense weight.

    One graph holds both: the original with dense approximated weights, and beside each
    such node the factor nodes as they stand in the compressed model, on the same input.
    """
    outputs = [use.output for r in replacements for use in r.layer.uses]
    reference, renamed = _side_by_side(original, compressed, replacements)
    dense = {_dense_name(number): r.dense() for number, r in enumerate(replacements)}
    session = open_session(reference, threads, [*outputs, *renamed.values()], dense)
    del dense
    worst = 0.0
    results = []
    for feed in feeds:
        values = _run(session, feed)
        for output in outputs:
            error = _rounding_error(values[output], values[renamed[output]])
            tolerance = ROUNDING[values[output].dtype]
            if not error <= tolerance:
                raise VerificationError(
                    f"tensor {output!r}: its two factor nodes differ from the dense weight "
                    f"by {error:.2g} of its largest value, {tolerance:g} is allowed; "
                    "nothing was written, please report this"
                )
            worst = max(worst, error)
        results.append(values)
    return worst, results


def _dense_name(number: int) -> str:
    return f"dense weight {number}"


def _side_by_side(
    original: onnx.ModelProto,
    compressed: onnx.ModelProto,
    replacements: Sequence[Replacement],
) -> tuple[onnx.ModelProto, dict[str, str]]:
    result = copy_without_initializers(original, {r.layer.source for r in replacements})
    graph = result.graph
    chained = [r for r in replacements if any(use.chain for use in r.layer.uses)]
    if chained:
        # Their old weight still has readers here: the nodes between it and the layer.
        kept = {r.layer.source for r in chained}
        graph.initializer.extend(t for t in original.graph.initializer if t.name in kept)
    present = {t.name for t in original.graph.initializer}
    # Before IR version 4 the weights left out are still listed as inputs.
    listed = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in present or v.name in listed]
    del graph.input[:]
    graph.input.extend(inputs)
    present.update(name for node in graph.node for name in node.output)
    present.update(value.name for value in graph.input)
    for number, replacement in enumerate(replacements):
        for use in replacement.layer.uses:
            graph.node[use.node].input[replacement.layer.weight_input] = _dense_name(number)
    new_weights = {t.name: t for t in compressed.graph.initializer if t.name not in present}
    graph.initializer.extend(new_weights.values())
    producer = {name: node for node in compressed.graph.node for name in node.output}
    renamed: dict[str, str] = {}
    copied: set[str] = set()
    for use in (use for r in replacements for use in r.layer.uses):
        renamed[use.output] = f"{use.output} by factors"
        _append_slice(graph, producer, use.output, renamed[use.output], present, copied)
    return result, renamed


def _append_slice(
    graph: onnx.GraphProto,
    producer: Mapping[str, onnx.NodeProto],
    output: str,
    renamed: str,
    present: set[str],
    copied: set[str],
) -> None:
    """Copy the nodes that make `output` from tensors of the original, output renamed."""
    nodes, wanted = [], [output]
    while wanted:
        name = wanted.pop()
        node = producer.get(name)
        if node is None or name in copied:
            continue
        copied.add(name)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        if name == output:
            copy.output[list(copy.output).index(output)] = renamed
        nodes.append(copy)
        wanted.extend(i for i in node.input if i and i not in present)
    graph.node.extend(reversed(nodes))


def _rounding_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    if expected.shape != actual.shape:
        return math.inf
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        return math.inf
    largest = float(np.abs(expected[finite]).max(initial=0.0))
    difference = float(np.abs(expected[finite] - actual[finite]).max(initial=0.0))
    return difference / largest if largest > 0 else difference


def _check_network(dense: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> float:
    worst = 0.0
    for expected, actual in zip(dense, results, strict=True):
        for name, value in actual.items():
            if not _is_numeric(value) or value.dtype.kind != "f":
                continue
            error = _relative_l2(expected[name], value)
            tolerance = AMPLIFICATION * ROUNDING[value.dtype]
            if not error <= tolerance:
                raise VerificationError(
                    f"output {name!r}: the rewritten model differs from the same model with "
                    f"dense weights by {error:.2g}, {tolerance:g} is allowed; "
                    "nothing was written, please report this"
                )
            worst = max(worst, error)
    return worst


def _relative_l2(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    if expected.shape != actual.shape:
        return math.inf
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        return math.inf
    norm = float(np.linalg.norm(expected[finite]))
    difference = float(np.linalg.norm(expected[finite] - actual[finite]))
    return difference / norm if norm > 0 else difference


def _compare(
    name: str, expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]
) -> OutputComparison:
    for before, after in zip(expected, actual, strict=True):
        if before.shape != after.shape or before.dtype != after.dtype:
            raise VerificationError(f"output {name!r}: shape or type changed; nothing was written")
    before = np.concatenate([np.ravel(v) for v in expected]).astype(np.float64)
    after = np.concatenate([np.ravel(v) for v in actual]).astype(np.float64)
    both = np.isfinite(before) & np.isfinite(after)
    if np.isfinite(before).all() and not both.all():
        raise VerificationError(f"output {name!r}: is no longer finite; nothing was written")
    before, after = before[both], after[both]
    norm, other = float(np.linalg.norm(before)), float(np.linalg.norm(after))
    noise = float(np.linalg.norm(before - after))
    relative = noise / norm if norm > 0 else noise
    return OutputComparison(
        name=name,
        max_abs=float(np.abs(before - after).max(initial=0.0)),
        relative_l2=relative,
        cosine=float(before @ after) / (norm * other)
        if norm > 0 and other > 0
        else float(noise == 0),
        sqnr_db=None if noise == 0 or norm == 0 else 20 * math.log10(norm / noise),
        argmax_agreement=_agreement(expected, actual),
    )


def _agreement(expected: Sequence[NDArray[Any]], actual: Sequence[NDArray[Any]]) -> float | None:
    if expected[0].ndim < 2 or expected[0].shape[1] < 2:
        return None
    same = [
        np.ravel(np.argmax(a, axis=1) == np.argmax(b, axis=1))
        for a, b in zip(expected, actual, strict=True)
    ]
    return float(np.concatenate(same).mean())
