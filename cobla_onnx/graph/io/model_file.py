"""Read a model, copy it without its weights, count its stored bytes, and write files atomically."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from cobla_onnx.errors import ModelError, UsageError, WriteError
from cobla_onnx.graph.check.structure import check_structure
from cobla_onnx.graph.io.external import is_external, open_external, read_external, true_place
from cobla_onnx.graph.order import Order, sort_nodes
from cobla_onnx.graph.protos import copy_fields, is_standard
from cobla_onnx.graph.sizes import table_bytes, tensor_bytes
from cobla_onnx.graph.tensors import all_tensors, constant_value, subgraphs
from cobla_onnx.text import safe_text

__all__ = [
    "add_initializers",
    "bytes_in",
    "constant_bytes",
    "copy_without_initializers",
    "is_weight",
    "load_in_order",
    "load_model",
    "stored_bytes",
    "unique_name",
    "without_weights",
    "write_atomically",
]

# Smaller external tensors are read at once: onnxruntime and shape inference look into them.
MAPPED_FROM = 4096
# What may be read at once: protobuf cannot hold more in one model.
PROTOBUF_LIMIT = 2**31 - 1


def load_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read a model, sort its nodes and check its structure; see `load_in_order`."""
    return load_in_order(path)[0]


def load_in_order(path: str | os.PathLike[str]) -> tuple[onnx.ModelProto, Order]:
    """Read a model, sort its nodes and check its structure.

    Large external initializers of the main graph stay on disk and are mapped into memory
    where they are read (see `cobla_onnx.graph.io.external`); all other data is in the model.

    Returns
    -------
    ModelProto
    Order
        What `restore_order` needs to have the nodes as they are in the file.

    Raises
    ------
    UsageError
        If there is no regular file at `path`.
    ModelError
        If it is not an ONNX model, is damaged, or its external data may not be read.
    """
    file = Path(path)
    shown = safe_text(str(file), 300)
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{shown}: cannot be read ({reason}); check the path") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{shown}: is not a regular file; give the path of an ONNX file")
    if status.st_size > PROTOBUF_LIMIT:
        raise ModelError(
            f"{shown}: has over 2 GB, which no ONNX file can hold; "
            "export the model with external data"
        )
    try:
        model = onnx.ModelProto()
        model.ParseFromString(file.read_bytes())
    except OSError as error:
        raise UsageError(f"{shown}: cannot be read ({error.strerror}); check the file") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(
            f"{shown}: is not an ONNX model, or is damaged; export or download it again"
        ) from error
    order = sort_nodes(model.graph)
    try:
        check_structure(model)
        _bind_external(model, file.parent)
    except ModelError as error:
        raise ModelError(f"{shown}: {error.message}") from error
    return model, order


def _bind_external(model: onnx.ModelProto, folder: Path) -> None:
    """Check all external data; read the small tensors, note the folder of the others."""
    base = os.path.realpath(folder)
    total = 0
    for held in all_tensors(model):
        tensor = held.tensor
        if not is_external(tensor):
            continue
        _note_place(tensor, base)
        open_external(tensor, held.label).close()
        size = tensor_bytes(tensor)
        if held.main and size > MAPPED_FROM:
            continue
        total += size
        if total > PROTOBUF_LIMIT:
            raise ModelError(
                f"{held.label}: tensors outside the main graph hold over 2 GB, which is not "
                "supported; make them initializers of the main graph"
            )
        read_external(tensor, held.label)


def _note_place(tensor: onnx.TensorProto, base: str) -> None:
    """Note the folder of a tensor's data, that of the model or where a link of a cache leads."""
    kept = [entry for entry in tensor.external_data if entry.key != "basepath"]
    locations = [entry for entry in kept if entry.key == "location"]
    # Several are damage, which the reader names.
    for entry in locations if len(locations) == 1 else ():
        base, entry.value = true_place(base, entry.value)
    del tensor.external_data[:]
    tensor.external_data.extend(kept)
    tensor.external_data.add(key="basepath", value=base)


def stored_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all weights that a model stores.

    Counted are all initializers (dense and sparse), and the tensors of Constant nodes that
    can be weights: of floating type, of more than 8 bytes; and the tables in attributes of
    ai.onnx.ml. Of the main graph, of sub-graphs and of model-local functions.
    """
    return bytes_in([model.graph], [function.node for function in model.functions])


def bytes_in(
    graphs: Iterable[onnx.GraphProto], nodes: Iterable[Iterable[onnx.NodeProto]] = ()
) -> int:
    """Bytes of the weights that graphs and lists of nodes store, with all sub-graphs."""
    total = 0
    waiting, node_lists = list(graphs), list(nodes)
    while waiting or node_lists:
        if waiting:
            graph = waiting.pop()
            total += sum(tensor_bytes(tensor) for tensor in graph.initializer)
            for sparse in graph.sparse_initializer:
                total += tensor_bytes(sparse.values) + tensor_bytes(sparse.indices)
            node_lists.append(graph.node)
        for node in node_lists.pop():
            total += constant_bytes(node) + table_bytes(node)
            waiting.extend(subgraphs(node))
    return total


def constant_bytes(node: onnx.NodeProto) -> int:
    """Bytes of the weight that a Constant node holds, in whatever attribute; 0 if it holds none."""
    value = constant_value(node)
    if value is not None:
        return tensor_bytes(value) if is_weight(value) else 0
    if node.op_type != "Constant" or not is_standard(node):
        return 0
    total = 0
    for attribute in node.attribute:
        if attribute.name == "value_floats" and len(attribute.floats) > 2:
            total += 4 * len(attribute.floats)
        elif attribute.name == "sparse_value" and is_weight(attribute.sparse_tensor.values):
            sparse = attribute.sparse_tensor
            total += tensor_bytes(sparse.values) + tensor_bytes(sparse.indices)
    return total


def is_weight(tensor: onnx.TensorProto) -> bool:
    """Tell a weight in a Constant node from a shape, an axis or a scalar."""
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    return ("FLOAT" in name or name == "DOUBLE") and tensor_bytes(tensor) > 8


def copy_without_initializers(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """Copy a model, leaving out the initializers called `names`.

    Field by field, so that the data left out is never copied: protobuf does not give
    memory back when a field is deleted. Fields unknown to this onnx version can only be
    kept by a whole copy, which is then what is made.
    """
    result = onnx.ModelProto()
    if len(UnknownFieldSet(model)) or len(UnknownFieldSet(model.graph)):
        result.CopyFrom(model)
        kept = [tensor for tensor in model.graph.initializer if tensor.name not in names]
        del result.graph.initializer[:]
        result.graph.initializer.extend(kept)
        return result
    copy_fields(model, result, ("graph",))
    result.graph.SetInParent()
    copy_fields(model.graph, result.graph, ("initializer",))
    result.graph.initializer.extend(t for t in model.graph.initializer if t.name not in names)
    return result


def add_initializers(model: onnx.ModelProto, tensors: Sequence[onnx.TensorProto]) -> None:
    """Let the main graph of a model store more tensors."""
    model.graph.initializer.extend(tensors)
    if model.ir_version < 4:
        # Before IR version 4 every initializer is also an input of the graph.
        model.graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors
        )


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with its large initializers turned into inputs, for checks of its graph."""
    large = [t for t in model.graph.initializer if is_external(t) or tensor_bytes(t) > MAPPED_FROM]
    result = copy_without_initializers(model, {t.name for t in large})
    named = {value.name for value in result.graph.input}
    result.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in large
        if t.name not in named
    )
    return result


def unique_name(wanted: str, taken: set[str]) -> str:
    """Return `wanted`, or `wanted_2`, ...: the first that is not in `taken`, and take it."""
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    taken.add(name)
    return name


def write_atomically(
    path: str | os.PathLike[str],
    data: bytes | Callable[[BinaryIO], None],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a file, or leave what is there as it was.

    The bytes go to a new file in the same folder, which is flushed to disk, passed to
    `check` and renamed. A symlink at `path` is written through. Whatever happens, no
    partial file is left, unless the process is killed; then what is left has a name that
    starts with a dot and ends in ``.tmp``.

    Parameters
    ----------
    data : bytes or callable
        What to write, or what writes it to an open file.
    check : callable, optional
        Gets the path of the new file before it takes its place.

    Raises
    ------
    WriteError
        If the file cannot be written. An error raised by `data` or `check` passes through.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            if target.exists() and not target.is_file():
                raise OSError("it is not a regular file")
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
            descriptor = os.open(temporary, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
            with os.fdopen(descriptor, "wb") as file:
                if callable(data):
                    data(file)
                else:
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check(temporary)
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            temporary.replace(target)
            _flush_folder(target.parent)
        except OSError as error:
            raise WriteError(
                f"{safe_text(str(path), 300)}: cannot be written ({error.strerror or error}); "
                "give another output path or free some space"
            ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename last; not every system and file system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
