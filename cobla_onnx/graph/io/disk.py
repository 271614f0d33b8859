"""What a model takes on disk: its files, their bytes, and their bytes after zip."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import onnx

from cobla_onnx.graph.io.external import is_external, true_place
from cobla_onnx.graph.tensors import all_tensors

__all__ = ["ZIPPED", "bytes_of", "files_of", "zipped_bytes_of"]

ZIPPED = 1 << 26
"""Most bytes of files that are zipped to be measured: that takes two or three seconds."""
CHUNK = 1 << 20


def files_of(path: Path) -> frozenset[Path]:
    """Return the file of a model that was read or written, and its external data files."""
    model = onnx.load(path, load_external_data=False)
    places = {
        entry.value
        for held in all_tensors(model)
        for entry in held.tensor.external_data
        if is_external(held.tensor) and entry.key == "location"
    }
    # The folder of the path as it was given: in a cache of links, files stand elsewhere.
    folder = path.parent.resolve()
    found = (Path(*true_place(str(folder), place)) for place in places)
    return frozenset({path.resolve(), *(place.resolve() for place in found)})


def bytes_of(files: Iterable[Path]) -> int:
    """Sum of the sizes of files."""
    return sum(file.stat().st_size for file in files)


def zipped_bytes_of(files: Iterable[Path]) -> int | None:
    """Sum of the sizes of files after deflate, as in a zip archive.

    The level is the fastest, which leaves a few per cent more than the usual one for a sixth of
    the time. Files are read in pieces. What the archive itself adds, some 100 bytes a file, is not
    counted.

    Returns
    -------
    int or None
        None, not measured, if they are more than `ZIPPED` bytes.
    """
    files = sorted(files)
    if bytes_of(files) > ZIPPED:
        return None
    total = 0
    for file in files:
        packer = zlib.compressobj(level=1, wbits=-zlib.MAX_WBITS)
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                total += len(packer.compress(chunk))
        total += len(packer.flush())
    return total
