"""External data: open it safely, map it into memory, and record where it is stored.

Files are opened in one place, by resolved path, and only beside or below the model: no
absolute path, no ``..``, no symlink, no hard link, no pipe or device, nothing beyond the
end of the file. onnx's reader was patched three times for these (CVE-2022-25882,
CVE-2024-27318, CVE-2026-27489); older onnx versions let some through.

One kind of symlink is followed, once, when the model is loaded: that of a Hugging Face cache,
from its ``snapshots`` to a file directly in the ``blobs`` beside them, see `true_place`.

Large tensors of the main graph stay on disk. `load_model` notes the model's folder under
the key ``basepath``, so that any copy of the tensor can be read later.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.errors import ModelError
from cobla_onnx.graph.sizes import tensor_bytes
from cobla_onnx.text import quoted

__all__ = [
    "PAGE",
    "external_bytes",
    "external_place",
    "is_external",
    "mapped_tensor",
    "open_external",
    "read_external",
    "true_place",
]

# Tensors that we write start at a page, so that they can be mapped.
PAGE = 4096
KEYS = {"location", "offset", "length", "checksum", "basepath"}


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor's data is in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def external_place(tensor: onnx.TensorProto, label: str) -> tuple[str, str, int, int]:
    """Folder, location in it, offset and length of a tensor's external data.

    Raises
    ------
    ModelError
        If the entries are not what ONNX allows, or lead out of the folder.
    """
    entries: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in entries or entry.key not in KEYS:
            raise ModelError(
                f"{label}: its external data has a doubled or unknown entry "
                f"{quoted(entry.key)}; the file is damaged, export it again"
            )
        entries[entry.key] = entry.value
    location = entries.get("location", "")
    if not _stays_inside(location):
        raise ModelError(
            f"{label}: its external data {quoted(location)} is outside the model's "
            "folder; only files beside the model are read, move the data there"
        )
    length = tensor_bytes(tensor)
    offset = _number(label, "offset", entries.get("offset", "0"))
    if _number(label, "length", entries.get("length", str(length))) != length:
        raise ModelError(
            f"{label}: its external data has length {quoted(entries['length'])}, its "
            f"shape {list(tensor.dims)} needs {length}; the file is damaged, export it again"
        )
    if "basepath" not in entries:
        raise ModelError(
            f"{label}: its external data is not loaded; pass the path of the file "
            "instead of the model"
        )
    return entries["basepath"], location, offset, length


def _stays_inside(location: str) -> bool:
    windows = PureWindowsPath(location)
    if not location or "\0" in location or windows.drive or windows.root:
        return False
    return not PurePosixPath(location).is_absolute() and ".." not in windows.parts


def true_place(folder: str, location: str) -> tuple[str, str]:
    """Follow a link of a Hugging Face cache; return any other place as it is.

    Such a cache keeps files as ``ROOT/blobs/HASH``, and a model's folder as relative symlinks
    ``ROOT/snapshots/REVISION/.../NAME`` to them. Whoever can put a link there can put a file
    into ``blobs``, too, so the link leads to nothing else. It has to be relative and lead
    directly to a regular file, not over other links or folders; folders on the way are none.

    Parameters
    ----------
    folder : str
        Of the model, resolved.
    location : str
        Of the data, as the tensor has it.
    """
    path = Path(folder, location)
    if not _stays_inside(location) or not path.is_symlink():
        return folder, location
    if os.path.realpath(path.parent) != os.path.normpath(path.parent):
        return folder, location
    found = next((p for p in path.parent.parents if p.name == "snapshots"), None)
    written = Path(path.readlink())
    target = Path(os.path.normpath(path.parent / written))
    if found is None or written.is_absolute() or target.parent != found.parent / "blobs":
        return folder, location
    # A link in place of the file or of ``blobs`` itself is left for `open_external` to refuse.
    return str(target.parent), target.name


def _number(label: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ModelError(
            f"{label}: its external data has {key} {quoted(text)}, which is not a size in "
            "bytes; the file is damaged, export it again"
        )
    return int(text)


def open_external(tensor: onnx.TensorProto, label: str) -> BinaryIO:
    """Open the file of a tensor's external data, after checking that it may be read."""
    folder, location, offset, length = external_place(tensor, label)
    path = Path(folder, location)
    problem = ""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if os.path.realpath(path) != os.path.normpath(path):
            problem = "is reached through a symlink"
        else:
            descriptor = os.open(path, os.O_RDONLY | flags)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                problem = "is not a regular file"
            elif status.st_nlink > 1:
                problem = "is a hard link"
            elif length > status.st_size or offset > status.st_size - length:
                problem = (
                    f"has {status.st_size} bytes, the tensor needs {length} from byte {offset} on"
                )
            if not problem:
                return os.fdopen(descriptor, "rb")
            os.close(descriptor)
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise ModelError(
        f"{label}: its external data {quoted(location)} {problem}; "
        "put the data file that belongs to the model beside it"
    )


def external_bytes(tensor: onnx.TensorProto, label: str) -> NDArray[np.uint8]:
    """Map a tensor's external data into memory, read only.

    Returns
    -------
    uint8 array, shape (length,)

    Raises
    ------
    ModelError
        If the file may not or cannot be read.
    """
    _, _, offset, length = external_place(tensor, label)
    if length == 0:
        return np.empty(0, np.uint8)
    with open_external(tensor, label) as file:
        return np.memmap(file, np.uint8, "r", offset, (length,))


def read_external(tensor: onnx.TensorProto, label: str) -> None:
    """Bring a tensor's external data into the model.

    Raises
    ------
    ModelError
        If the file may not or cannot be read.
    """
    data = external_bytes(tensor, label).tobytes()
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = data


def mapped_tensor(name: str, array: NDArray[Any]) -> onnx.TensorProto | None:
    """Return a tensor that points to the file behind a whole-file map, or None."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return None
    path = Path(str(array.filename))
    tensor = onnx.TensorProto(
        name=name,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", path.name), ("basepath", str(path.parent))):
        tensor.external_data.add(key=key, value=value)
    return tensor
