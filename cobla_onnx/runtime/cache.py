"""Cache results between runs, keyed by the content of everything they were computed from.

An entry is an ordinary ``.npz`` file without pickles, named by a digest of everything that
its arrays depend on: the bytes of weights or data, the options, the version of the algorithm
and those of the libraries that compute. It is written under another name and renamed, so that
two processes may write at once, and a process may be killed at any moment. It holds a
checksum; an entry that does not fit it is reported, computed anew and replaced.

There is no clean-up: entries of other versions are never read. Delete the folder at will.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import scipy.linalg  # loads its BLAS, which `environment` names
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

from cobla_onnx import __version__
from cobla_onnx.errors import UsageError
from cobla_onnx.runtime.damaged import DAMAGED
from cobla_onnx.runtime.parser import PARSER
from cobla_onnx.text import safe_text
from cobla_onnx.wording import option_name

__all__ = ["Arrays", "Cache", "digest", "fetch"]

Arrays: TypeAlias = "dict[str, NDArray[Any]]"

# Counted up whenever the same key would stand for other numbers: older entries are then
# never asked for.
VERSION = 4
CHECKSUM = "sha256"
# Seconds after which the file of a killed writer is removed.
ABANDONED = 24 * 3600.0


def digest(*parts: Any) -> str:
    """Hash values of any nesting so that no two different ones are alike, as far as known.

    Parameters
    ----------
    *parts : None, bool, int, float, str, bytes, array, tuple, list, dict or dataclass
        Each is hashed with its type and length; arrays with their type and shape.

    Raises
    ------
    TypeError
        If a part is of a type that has no defined content.

    Examples
    --------
    >>> digest("ab", "c") == digest("a", "bc")
    False
    """
    state = hashlib.sha256()
    _feed(state, parts)
    return state.hexdigest()


def _feed(state: Any, part: Any) -> None:
    if isinstance(part, np.ndarray):
        _feed(state, ("array", part.dtype.str, part.dtype.name, part.shape))
        # Raw bytes: numpy's own buffer protocol does not know bfloat16.
        state.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    elif is_dataclass(part) and not isinstance(part, type):
        values = (getattr(part, field.name) for field in fields(part))
        _feed(state, (type(part).__name__, *values))
    elif isinstance(part, (tuple, list)):
        state.update(f"{type(part).__name__} {len(part)}\n".encode())
        for entry in part:
            _feed(state, entry)
    elif isinstance(part, dict):
        _feed(state, ("dict", *sorted(part.items())))
    elif isinstance(part, bytes):
        state.update(b"bytes %d\n" % len(part))
        state.update(part)
    elif part is None or isinstance(part, (bool, int, float, str)):
        text = repr(part).encode()
        state.update(f"{type(part).__name__} {len(text)}\n".encode() + text)
    else:
        raise TypeError(f"{type(part).__name__} has no defined content")


@lru_cache(maxsize=1)
def environment() -> tuple[str, ...]:
    """What decides the last bits of a result beside its input: libraries and processor."""
    blas = sorted(
        f"{info['prefix']} {info['version']} {info.get('architecture', '')}"
        for info in threadpool_info()
        if info["user_api"] == "blas"
    )
    versions = (__version__, np.__version__, scipy.__version__, onnxruntime.__version__)
    return (platform.machine(), *versions, *blas)


class Cache:
    """Arrays in a folder, by the content that they were computed from.

    Parameters
    ----------
    folder : path
        Made if it is not there.

    Attributes
    ----------
    hits, misses : int
        Entries that were found, and those that were not.
    notes : list of str
        Entries that were damaged, or could not be written.

    Raises
    ------
    UsageError
        If the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self.hits = self.misses = 0
        self.notes: list[str] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
        except OSError as error:
            raise UsageError(
                f"{option_name('cache', safe_text(str(folder)))}: cannot be used as a folder "
                f"({error.strerror}); give another one"
            ) from error

    def fresh(self) -> Cache:
        """Return the same cache without its counts and notes: for a unit of work to report."""
        result = copy(self)
        result.hits = result.misses = 0
        result.notes = []
        return result

    def get(self, kind: str, key: str) -> Arrays | None:
        """Return the arrays of a key, or None where there are none that can be trusted."""
        path = self._path(kind, key)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored, PARSER:
                arrays = {name: stored[name] for name in stored.files}
            expected = str(arrays.pop(CHECKSUM))
            if _checksum(kind, key, arrays) != expected:
                raise ValueError("its content does not fit its checksum")
        except FileNotFoundError:
            self.misses += 1
            return None
        except DAMAGED as error:
            self.misses += 1
            text = str(error) or type(error).__name__
            self._note(f"{path.name} is damaged and was computed anew: {text}")
            return None
        self.hits += 1
        return arrays

    def put(self, kind: str, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Store arrays under a key; where the disk refuses, a note says so."""
        stored: dict[str, Any] = dict(arrays)
        stored[CHECKSUM] = np.array(_checksum(kind, key, stored))
        path = self._path(kind, key)
        name = None
        try:
            descriptor, name = tempfile.mkstemp(".tmp", f".{path.stem[:40]}-", self._folder)
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, **stored)
            os.replace(name, path)
        except OSError as error:
            if name is not None:
                Path(name).unlink(missing_ok=True)
            self._note(f"{path.name} could not be written ({error.strerror})")

    def _path(self, kind: str, key: str) -> Path:
        return self._folder / f"{kind}-{digest(VERSION, environment(), key)}.npz"

    def _note(self, text: str) -> None:
        self.notes.append(f"--cache {safe_text(str(self._folder), 200)}: {safe_text(text, 300)}")

    def _remove_abandoned(self) -> None:
        for path in self._folder.glob(".*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
            except FileNotFoundError:
                # Another process was faster.
                continue


def fetch(cache: Cache | None, kind: str, key: str, compute: Callable[[], Arrays]) -> Arrays:
    """Return the arrays of a key, computed and stored first if the cache lacks them."""
    found = None if cache is None else cache.get(kind, key)
    if found is None:
        found = compute()
        if cache is not None:
            cache.put(kind, key, found)
    return found


def _checksum(kind: str, key: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    return digest(kind, key, dict(arrays))
