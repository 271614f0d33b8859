"""Write a model, either as one file or with its weights in a data file beside it.

The data file is named by its content (``model-<sha256>.data``) and written whole before
the model; renaming the model is the moment from which the new one counts. Nothing is ever
appended to, and only files that this run made are removed when something fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import UsageError, WriteError
from cobla_onnx.graph.io.external import PAGE, external_bytes, is_external
from cobla_onnx.graph.io.model_file import (
    PROTOBUF_LIMIT,
    copy_without_initializers,
    write_atomically,
)
from cobla_onnx.graph.protos import copy_fields
from cobla_onnx.graph.sizes import tensor_bytes
from cobla_onnx.graph.tensors import tensor_array
from cobla_onnx.text import quoted, safe_text
from cobla_onnx.wording import option_name

__all__ = ["ExternalData", "save_model", "saved_bytes"]

ExternalData: TypeAlias = Literal["auto", "always", "never"]
# Smaller tensors stay in the model: a page each would cost more than it saves.
SMALLEST = 1024
# Room in the model file for everything but initializers.
RESERVE = 1 << 24
CHUNK = 1 << 26


def save_model(
    model: onnx.ModelProto,
    path: str | os.PathLike[str],
    external_data: ExternalData,
    check: Callable[[Path], None],
) -> None:
    """Write a model atomically, its large weights inside or beside it.

    Parameters
    ----------
    external_data : {'auto', 'always', 'never'}
        ``auto``: beside it if one file cannot hold them.
    check : callable
        Gets the path of the new model, its data in place, before it takes the old one's.

    Raises
    ------
    UsageError
        If 'never' is asked for and one file cannot hold the model.
    WriteError
        If a file cannot be written.
    """
    target = Path(os.path.realpath(path))
    beside = _beside(model, external_data)
    if not beside:
        write_atomically(path, _whole(model).SerializeToString(deterministic=True), check)
        return
    with _data_file(beside, target) as (name, offsets):
        light = _copy(model, offsets, name)
        write_atomically(path, light.SerializeToString(deterministic=True), check)


def saved_bytes(model: onnx.ModelProto, external_data: ExternalData, stem: str = "model") -> int:
    """Count the bytes of the files that `save_model` would write, without writing them.

    Parameters
    ----------
    external_data : {'auto', 'always', 'never'}
    stem : str
        Of the model's file: a data file has it in its name, which the model holds.

    Raises
    ------
    UsageError
        If 'never' is asked for and one file cannot hold the model.
    """
    beside = _beside(model, external_data)
    if not beside:
        return int(_whole(model).ByteSize())
    offsets, end = _offsets(beside)
    return int(_copy(model, offsets, _data_name(stem, "")).ByteSize()) + end


def _whole(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model with all its weights inside."""
    mapped = any(map(is_external, model.graph.initializer))
    return _copy(model, {}, "") if mapped else model


def _offsets(beside: list[onnx.TensorProto]) -> tuple[dict[str, int], int]:
    """Place tensors in the data file, each on a page of its own; also return where they end."""
    offsets: dict[str, int] = {}
    end = 0
    for tensor in beside:
        offsets[tensor.name] = end + -end % PAGE
        end = offsets[tensor.name] + tensor_bytes(tensor)
    return offsets, end


def _data_name(stem: str, digest: str) -> str:
    """Name a data file by its content."""
    return f"{stem[:100]}-{digest[:12]:0<12}.data"


def _beside(model: onnx.ModelProto, external_data: ExternalData) -> list[onnx.TensorProto]:
    """Tensors that go into the data file."""
    stored = model.graph.initializer
    total = sum(tensor_bytes(tensor) for tensor in stored)
    too_large = total > PROTOBUF_LIMIT - RESERVE
    if external_data == "never" and too_large:
        raise UsageError(
            f"{option_name('external_data', 'never')}: the result holds {total} bytes, an ONNX "
            "file at most 2 GB; leave the option out"
        )
    if external_data == "never":
        return []
    if external_data == "auto" and not too_large:
        return []
    return [
        tensor
        for tensor in stored
        if tensor_bytes(tensor) >= SMALLEST and tensor.data_type != onnx.TensorProto.STRING
    ]


def _copy(model: onnx.ModelProto, offsets: dict[str, int], location: str) -> onnx.ModelProto:
    """Copy a model for writing: tensors with an offset point to the data file."""
    result = copy_without_initializers(model, {t.name for t in model.graph.initializer})
    for tensor in model.graph.initializer:
        copy = result.graph.initializer.add()
        offset = offsets.get(tensor.name)
        if offset is None and not is_external(tensor):
            copy.CopyFrom(tensor)
            continue
        data = {field for field in tensor.DESCRIPTOR.fields_by_name if field.endswith("_data")}
        copy_fields(tensor, copy, {*data, "data_location"})
        if offset is None:
            copy.raw_data = _raw(tensor).tobytes()
            continue
        copy.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", location),
            ("offset", str(offset)),
            ("length", str(tensor_bytes(tensor))),
        ):
            copy.external_data.add(key=key, value=value)
    return result


def _raw(tensor: onnx.TensorProto) -> NDArray[np.uint8]:
    """Return a tensor's bytes as ONNX stores them."""
    label = f"initializer {quoted(tensor.name)}"
    if is_external(tensor):
        return external_bytes(tensor, label)
    if not tensor.HasField("raw_data"):
        tensor = onnx.numpy_helper.from_array(tensor_array(tensor, label))
    return np.frombuffer(tensor.raw_data, np.uint8)


@contextlib.contextmanager
def _data_file(
    beside: list[onnx.TensorProto], target: Path
) -> Iterator[tuple[str, dict[str, int]]]:
    """Write the data file; remove it again if what follows fails and it was not there before."""
    digest = hashlib.sha256()
    offsets, _ = _offsets(beside)
    final = target

    def write(file: BinaryIO) -> None:
        position = 0
        for tensor in beside:
            padding = bytes(offsets[tensor.name] - position)
            data = _raw(tensor)
            position = offsets[tensor.name] + len(data)
            digest.update(padding)
            file.write(padding)
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK].tobytes()
                digest.update(chunk)
                file.write(chunk)

    # First under a name of chance, since the final one depends on the content.
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.data.tmp")
    made: list[Path] = []
    try:
        write_atomically(temporary, write)
        made.append(temporary)
        final = target.with_name(_data_name(target.stem, digest.hexdigest()))
        if final.exists():
            _same(final, digest.hexdigest())
        else:
            made.append(final)
            try:
                temporary.replace(final)
            except OSError as error:
                raise WriteError(
                    f"{safe_text(str(final), 300)}: cannot be written ({error.strerror}); "
                    "give another output path"
                ) from error
        yield final.name, offsets
        made = [temporary]
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _same(path: Path, digest: str) -> None:
    """Make sure that a data file that is there already holds what its name says."""
    found = hashlib.sha256()
    try:
        if not path.is_file():
            raise OSError("it is not a regular file")
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                found.update(chunk)
    except OSError as error:
        raise WriteError(
            f"{safe_text(str(path), 300)}: cannot be read ({error.strerror or error}); "
            "move it away or give another output path"
        ) from error
    if found.hexdigest() != digest:
        raise WriteError(
            f"{safe_text(str(path), 300)}: exists, with other content than its name says; "
            "move it away or give another output path"
        )
