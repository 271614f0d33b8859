"""onnxruntime sessions: open a model without copying its weights, feed it, read its tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError, UsageError
from cobla_onnx.graph.io.external import PAGE, external_place, is_external, open_external
from cobla_onnx.graph.io.model_file import copy_without_initializers
from cobla_onnx.graph.layers import all_inputs
from cobla_onnx.graph.macs import MOST_ELEMENTS, Shape
from cobla_onnx.graph.sizes import tensor_bytes
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.runtime.machine import return_freed_memory, return_large_arrays
from cobla_onnx.runtime.part_errors import part_error
from cobla_onnx.runtime.providers import CPU, current_provider, memory_is_given_back
from cobla_onnx.runtime.temporary import array_bytes, temporary_folder
from cobla_onnx.runtime.watch import at_most
from cobla_onnx.text import first_line, quoted, safe_text
from cobla_onnx.wording import option_name

__all__ = [
    "BY_FILE",
    "Feeds",
    "measured_shapes",
    "open_session",
    "random_feeds",
    "run_session",
    "runnable_feeds",
]

Feeds: TypeAlias = "dict[str, NDArray[Any]]"
# Option by which a model given as bytes finds its data files, and versions that know it.
FOLDER = "session.model_external_initializers_file_folder_path"
MAPS_FILES = tuple(int(n) for n in onnxruntime.__version__.split(".")[:2]) >= (1, 21)
# Bytes of weights from which on a session gets them in a file.
BY_FILE = 1 << 28
# Bytes of weights from which on opening a session takes so long that giving back what is free
# costs nothing beside it.
TRIMMED = 1 << 25
WEIGHTS = "weights"
SIZES_TO_TRY = (16, 64, 224, 512, 1)
# Seconds that one run may take, so that a loop without end does not keep us.
RUN_LIMIT = 900.0


def open_session(
    model: onnx.ModelProto,
    threads: int,
    extra_outputs: Sequence[str] = (),
    extra_weights: Mapping[str, NDArray[Any]] | None = None,
    *,
    optimized: bool = False,
    timed: bool = False,
    part: str = "",
    profile: str = "",
    written: str = "",
) -> onnxruntime.InferenceSession:
    """Open a model in onnxruntime without serialising its weights.

    It runs on the provider of `execution_provider`. Graph optimisations are off unless
    asked for, so that two models are compared at the same level. `extra_weights` are
    initializers beside those that the model holds. A session to be timed is one as users
    open it, optimised and with threads that spin while it runs, and only then. `part` says
    what for the model was cut from one that loads as a whole. With `profile`, the beginning of
    a file's name, onnxruntime writes there what its nodes do. `written` names a file for the graph
    after the optimisations that do not depend on the processor, large weights in another beside it.

    Raises
    ------
    ModelError
        If onnxruntime does not load the model; `PartError` if it is a part.
    """
    provider = current_provider()
    folder = _mapped_folder(model)
    large = [tensor for tensor in model.graph.initializer if _to_hand_over(tensor, folder)]
    trimmed = sum(map(tensor_bytes, large)) >= TRIMMED
    if trimmed:
        return_large_arrays()
    if trimmed or memory_is_given_back():
        # What arrays and sessions before it have left is not used again by this one.
        return_freed_memory()
    light = copy_without_initializers(model, {t.name for t in large})
    # onnxruntime drops what nobody reads, and then misses it.
    read = {name for node in light.graph.node for name in all_inputs(node)}
    present = {value.name for value in light.graph.output}
    # A weight may be an output itself.
    read |= present | set(extra_outputs)
    for name in extra_outputs:
        if name not in present:
            light.graph.output.add(name=name)
    options = _session_options(threads, optimized, timed)
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    if written:
        _write_graph(options, written)
    if folder is not None:
        options.add_session_config_entry(FOLDER, folder)
        _leave_in_folder(light)
    large = [t for t in large if t.name in read]
    # Users' sessions have their weights in memory.
    by_file = folder is None and not timed
    with _handed_over(light, options, large, extra_weights or {}, by_file):
        try:
            session = onnxruntime.InferenceSession(
                light.SerializeToString(), options, providers=list(dict.fromkeys((provider, CPU)))
            )
        except Exception as error:
            if part:
                raise part_error(light, part, first_line(error)) from error
            raise ModelError(
                f"onnxruntime {onnxruntime.__version__} cannot load the model: "
                f"{first_line(error)}; check the file with onnx.checker, or update onnxruntime"
            ) from error
    if provider not in session.get_providers():
        # onnxruntime goes on with the CPU, and only its log says so.
        raise UsageError(
            f"{option_name('provider', provider)}: onnxruntime could not start it; check its "
            "driver and libraries, or leave the option out"
        )
    return session


def _session_options(threads: int, optimized: bool, timed: bool) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if timed:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        # Threads that wait by spinning would take the cores from linear algebra.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # With a pattern a session holds its tensors twice: as the first run found room for them,
        # and in one piece for the runs after it.
        options.enable_mem_pattern = False
    if not (optimized or timed):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _write_graph(options: onnxruntime.SessionOptions, path: str) -> None:
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = path
    for part, value in (("file_name", f"{Path(path).stem}.data"), ("min_size_in_bytes", "1024")):
        key = f"session.optimized_model_external_initializers_{part}"
        options.add_session_config_entry(key, value)


@contextmanager
def _handed_over(
    light: onnx.ModelProto,
    options: onnxruntime.SessionOptions,
    tensors: Sequence[onnx.TensorProto],
    extra: Mapping[str, NDArray[Any]],
    by_file: bool,
) -> Iterator[None]:
    """Hand weights to the session that is opened inside of the block, beside the model.

    In memory, of which onnxruntime makes a copy; where they are many in a file, which it
    maps, one after the other.
    """
    size = sum(map(tensor_bytes, tensors)) + sum(array.nbytes for array in extra.values())
    with ExitStack() as stack:
        file: BinaryIO | None = None
        if by_file and MAPS_FILES and os.name == "posix" and size >= BY_FILE:
            folder = stack.enter_context(temporary_folder("weights"))
            options.add_session_config_entry(FOLDER, str(folder))
            file = stack.enter_context((folder / WEIGHTS).open("wb"))
        values = _add_weights(light, tensors, extra, file)
        if values:
            options.add_external_initializers(list(values), list(values.values()))
        if file is not None:
            file.flush()
        yield


def _add_weights(
    light: onnx.ModelProto,
    tensors: Iterable[onnx.TensorProto],
    extra: Mapping[str, NDArray[Any]],
    file: BinaryIO | None,
) -> dict[str, onnxruntime.OrtValue]:
    """Declare weights in a model, write them to a file, and return those that stay in memory."""
    values = {}
    for name, data_type, array in chain(map(_read, tensors), map(_typed, extra.items())):
        stub = light.graph.initializer.add(
            name=name,
            data_type=data_type,
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        if light.ir_version < 4 and name in extra:
            # What bodies alone read is not found otherwise.
            light.graph.input.append(
                onnx.helper.make_tensor_value_info(name, data_type, array.shape)
            )
        contiguous = np.ascontiguousarray(array)
        if contiguous.nbytes != tensor_bytes(stub):
            # A type of less than a byte, which numpy unpacks, and onnxruntime reads as it is.
            raw = onnx.numpy_helper.from_array(contiguous).raw_data
            contiguous = np.frombuffer(raw, np.uint8)
            if file is None:
                stub.ClearField("data_location")
                stub.raw_data = raw
                continue
        entries: dict[str, object] = {"location": "held in memory"}
        if file is not None:
            place = file.seek(-(-file.tell() // PAGE) * PAGE)
            file.write(array_bytes(contiguous))
            entries = {"location": WEIGHTS, "offset": place, "length": contiguous.nbytes}
        else:
            make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
            values[name] = make(contiguous, data_type)
        for key, value in entries.items():
            stub.external_data.add(key=key, value=str(value))
    return values


def _read(tensor: onnx.TensorProto) -> tuple[str, int, NDArray[Any]]:
    array = tensor_array(tensor, f"initializer {quoted(tensor.name)}")
    return tensor.name, tensor.data_type, array


def _typed(item: tuple[str, NDArray[Any]]) -> tuple[str, int, NDArray[Any]]:
    name, array = item
    return name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array


def _mapped_folder(model: onnx.ModelProto) -> str | None:
    """Folder whose data files onnxruntime can map by itself, without a copy in memory."""
    if not MAPS_FILES:
        return None
    mapped = (t for t in model.graph.initializer if is_external(t))
    return next((external_place(t, t.name)[0] for t in mapped), None)


def _to_hand_over(tensor: onnx.TensorProto, folder: str | None) -> bool:
    """Whether a tensor is handed over beside the model, and not inside or in `folder`."""
    if is_external(tensor):
        return external_place(tensor, tensor.name)[0] != folder
    return tensor_bytes(tensor) > 1024 and tensor.data_type != onnx.TensorProto.STRING


def _leave_in_folder(light: onnx.ModelProto) -> None:
    """Take the folder out of external tensors: onnxruntime gets it as an option."""
    for tensor in light.graph.initializer:
        kept = [entry for entry in tensor.external_data if entry.key != "basepath"]
        if len(kept) < len(tensor.external_data):
            open_external(tensor, f"initializer {quoted(tensor.name)}").close()
            del tensor.external_data[:]
            tensor.external_data.extend(kept)


def run_session(session: onnxruntime.InferenceSession, feeds: Feeds) -> dict[str, Any]:
    """Run a session for all its outputs but those of bfloat16, a type that numpy lacks.

    Raises
    ------
    ModelError
        If onnxruntime fails on these inputs.
    """
    names = [o.name for o in session.get_outputs() if "bfloat16" not in o.type]
    options = onnxruntime.RunOptions()
    if memory_is_given_back():
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    try:
        with at_most(RUN_LIMIT, partial(setattr, options, "terminate", True)):
            values = session.run(names, feeds, options) if names else ()
        return dict(zip(names, values, strict=True))
    except Exception as error:
        shapes = {safe_text(name): list(value.shape) for name, value in feeds.items()}
        together = any(value.ndim and len(value) > 1 for value in feeds.values())
        advice = f", or run one sample at a time by {option_name('batch', 1)}" if together else ""
        raise ModelError(
            f"onnxruntime cannot run the model on inputs of shapes {shapes}: "
            f"{first_line(error)}; give inputs that it accepts, or "
            f"{option_name('input_shapes')} where they are random{advice}"
        ) from error


def random_feeds(
    session: onnxruntime.InferenceSession,
    shapes: Mapping[str, Shape],
    seed: int,
    batch: int = 1,
    unknown: int = SIZES_TO_TRY[0],
    words: Sequence[str] = ("0", "1"),
) -> Feeds:
    """Draw inputs that fit the types and shapes of a model's inputs.

    Floats are standard normal, integers 0 or 1 (valid as token, index and mask), texts some
    of `words`, each from `seed`. A symbolic first axis becomes `batch`, and so do axes of the
    same symbol; other unknown axes become `unknown`.

    Raises
    ------
    ModelError
        If an input is of a type that cannot be drawn, such as a sequence.
    """
    generator = np.random.default_rng(seed)
    feeds: Feeds = {}
    inputs = session.get_inputs()
    batches = {v.shape[0] for v in inputs if v.shape and isinstance(v.shape[0], str)}
    for value in inputs:
        declared = list(value.shape)
        known = list(shapes.get(value.name) or [None] * len(declared))
        for axis, size in enumerate(known):
            symbol = declared[axis]
            first = axis == 0 and not isinstance(symbol, int)
            if (first and size in (None, 1)) or (size is None and symbol in batches):
                known[axis] = batch
            elif size is None:
                known[axis] = unknown
        sizes = [int(size) for size in known if size is not None]
        if math.prod(sizes) > MOST_ELEMENTS:
            raise ModelError(
                f"input {quoted(value.name)}: has shape {sizes}, more than {MOST_ELEMENTS} "
                f"numbers; give a smaller one by {option_name('input_shapes')}"
            )
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        if kind in ("float", "float16", "double"):
            dtype = {"float": "float32", "float16": "float16", "double": "float64"}[kind]
            feeds[value.name] = generator.standard_normal(sizes).astype(dtype)
        elif kind == "bool" or kind.lstrip("u").startswith("int"):
            feeds[value.name] = generator.integers(0, 2, sizes).astype(kind)
        elif kind == "string":
            drawn = generator.integers(0, len(words), sizes)
            feeds[value.name] = np.array(words, object)[drawn].reshape(sizes)
        else:
            raise ModelError(
                f"input {quoted(value.name)}: cannot make random values of {value.type}"
            )
    return feeds


def runnable_feeds(
    session: onnxruntime.InferenceSession,
    shapes: Mapping[str, Shape],
    seed: int,
    words: Sequence[str] = ("0", "1"),
) -> tuple[list[Feeds], list[dict[str, Any]], int]:
    """Find sizes for unknown axes that the model accepts; return inputs and outputs."""
    failure: ModelError | None = None
    for unknown in SIZES_TO_TRY:
        try:
            feeds = [random_feeds(session, shapes, seed, 1, unknown, words)]
            results = [run_session(session, feeds[0])]
        except ModelError as error:
            failure = failure or error
            if all(None not in (shape or (None,)) for shape in shapes.values()):
                break
            continue
        # Many a graph has the batch written into a Reshape: another single one must do then.
        for batch in (3, 1):
            more = random_feeds(session, shapes, seed + 1, batch, unknown, words)
            try:
                results.append(run_session(session, more))
            except ModelError:
                continue
            feeds.append(more)
            break
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
    results = run_session(session, random_feeds(session, shapes, seed=0))
    return {name: tuple(results[name].shape) for name in names}
