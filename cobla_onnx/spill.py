"""Keep factors on disk where there are too many of them for memory."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.rewrite import Replacement

__all__ = ["Spill"]

# Bytes of factors that are kept in memory.
SPILL_FROM = 1 << 30


class Spill:
    """A temporary folder with one file for each factor; it goes when this object goes."""

    def __init__(self) -> None:
        self._folder: Path | None = None

    def replacements(self, given: Sequence[Replacement]) -> list[Replacement]:
        """Return replacements whose factors are mapped files, if they are large in all."""
        if sum(r.first.nbytes + r.second.nbytes for r in given) <= SPILL_FROM:
            return list(given)
        self._folder = Path(tempfile.mkdtemp(prefix="cobla-onnx-"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return [
            replace(
                r,
                first=self._mapped(r.first, f"{number}-first"),
                second=self._mapped(r.second, f"{number}-second"),
            )
            for number, r in enumerate(given)
        ]

    def _mapped(self, array: NDArray[Any], name: str) -> NDArray[Any]:
        assert self._folder is not None
        path = self._folder / name
        array.tofile(path)
        return np.memmap(path, array.dtype, "r", shape=array.shape)
