"""Move what is stored for layers to files on disk when it is too large for memory."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.graph.io.model_file import MAPPED_FROM
from cobla_onnx.runtime.temporary import array_bytes
from cobla_onnx.variants.replacement import Replacement

__all__ = ["Spill"]

# Bytes of arrays that are kept in memory.
SPILL_FROM = 1 << 30


class Spill:
    """A temporary folder with one file for each large array, deleted with this object."""

    def __init__(self) -> None:
        self._folder: Path | None = None

    def replacements(self, given: Iterable[Replacement]) -> list[Replacement]:
        """Collect replacements; beyond a total size large arrays become mapped files.

        They are taken one by one, so that no more than this size is ever in memory.
        """
        kept: list[Replacement] = []
        size = 0
        for replacement in given:
            size += replacement.held
            if self._folder is None and size > SPILL_FROM:
                self._folder = Path(tempfile.mkdtemp(prefix="cobla-onnx-"))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
                kept = [self._on_disk(r, n) for n, r in enumerate(kept)]
            if self._folder is not None:
                replacement = self._on_disk(replacement, len(kept))
            kept.append(replacement)
        return kept

    def _on_disk(self, replacement: Replacement, number: int) -> Replacement:
        def place(part: str, array: NDArray[Any]) -> NDArray[Any]:
            return self._mapped(array, f"{number}-{part.replace('/', '-')}")

        return replacement.moved(place)

    def _mapped(self, array: NDArray[Any], name: str) -> NDArray[Any]:
        assert self._folder is not None
        # As for external data of models: onnxruntime looks into small ones, such as shapes.
        if array.nbytes < MAPPED_FROM:
            return array
        path = self._folder / name
        path.write_bytes(array_bytes(array))
        return np.memmap(path, array.dtype, "r", shape=array.shape)
