"""Labels of calibration samples; where they are given, the loss is the cross-entropy."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.data.arrays import LABEL_NAMES
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.evaluation.targets import IGNORED
from cobla_onnx.errors import DataError, UsageError
from cobla_onnx.runtime.damaged import DAMAGED
from cobla_onnx.runtime.parser import PARSER
from cobla_onnx.text import first_line, quoted
from cobla_onnx.wording import option_name

__all__ = ["Labels", "align_labels", "labels_of_batches", "read_labels"]

Labels: TypeAlias = "Sequence[int] | NDArray[Any] | Mapping[str, int]"
"""Classes: an array in the order of the samples, or by path if samples are files."""

# The parts of a path, and the path as written.
_Key: TypeAlias = "tuple[tuple[str, ...], str]"


def read_labels(path: Path) -> Labels:
    """Read labels from a file.

    Parameters
    ----------
    path : Path
        An ``.npy`` file, an ``.npz`` file with one array, or one called ``labels``,
        ``label`` or ``y``, of any shape that `targets.one_hot` takes; or a ``.csv`` file with a
        class on each line, or with a file or the number of a sample, from 0, and a class.
        Separated by commas, semicolons or tabs; a first line without a number is a heading.

    Raises
    ------
    UsageError
        If there is no such file, or its extension is not known.
    DataError
        If it does not hold labels.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{option_name('labels', path)}: is not a file; check the path")
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix not in (".npy", ".npz"):
        raise UsageError(
            f"{option_name('labels', path)}: is neither .csv, .npy nor .npz; give one of these"
        )
    try:
        with PARSER:
            content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            named = [name for name in LABEL_NAMES if name in content.files]
            chosen = named[0] if named else content.files[0] if len(content.files) == 1 else None
            if chosen is None:
                raise DataError(
                    f"{path}: has no array called {' or '.join(map(repr, LABEL_NAMES))}"
                )
            with PARSER:
                labels: NDArray[Any] = content[chosen]
            return labels
    except DAMAGED as error:
        raise DataError(
            f"{path}: holds no numbers that numpy reads ({first_line(error)}); save it again"
        ) from error


def _read_csv(path: Path) -> Labels:
    try:
        # Spreadsheets write a byte-order mark first.
        text = path.read_text(encoding="utf-8-sig")
        rows = _rows(text)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: is not a text of comma-separated values; save it again"
        ) from error
    if rows and _class(rows[0][1][-1]) is None and not _is_number(rows[0][1][-1]):
        rows = rows[1:]
    widths = {len(row) for _, row in rows}
    wrong = next(((line, row) for line, row in rows if _class(row[-1]) is None), None)
    if not rows or wrong is not None or widths - {1, 2} or len(widths) > 1:
        shown = "" if wrong is None else f"; line {wrong[0]} has {quoted(','.join(wrong[1]))}"
        raise DataError(
            f"{path}: needs a class, a whole number from 0, on each line, or a file name and a "
            f"class{shown}; write it so"
        )
    if widths == {1}:
        return np.array([_class(row[0]) for _, row in rows])
    labels: dict[str, int] = {}
    for line, (name, text) in rows:
        label = _class(text)
        assert label is not None
        if labels.setdefault(name.strip(), label) != label:
            raise DataError(
                f"{path}: line {line} gives {quoted(name)} a second class; keep one of them"
            )
    numbers = {int(name): label for name, label in labels.items() if name.isdecimal()}
    if sorted(numbers) == list(range(len(labels))):
        return np.array([numbers[number] for number in range(len(labels))])
    return labels


def _rows(text: str) -> list[tuple[int, list[str]]]:
    """Numbered rows of a table, split by the separator that gives two cells each, else commas."""
    tables = []
    for delimiter in ",;\t":
        reader = csv.reader(text.splitlines(), delimiter=delimiter)
        tables.append([(reader.line_num, row) for row in reader if any(map(str.strip, row))])
    return next((t for t in tables if t and {len(row) for _, row in t} == {2}), tables[0])


def _class(text: str) -> int | None:
    """Return the class in a cell: a non-negative whole number, possibly written as 3.0."""
    if not _is_number(text):
        return None
    value = float(text)
    return int(value) if (value >= 0 or value == IGNORED) and value.is_integer() else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def align_labels(labels: Labels, dataset: Dataset) -> NDArray[np.int64]:
    """Put labels in the order of a dataset's samples.

    Returns
    -------
    int64 array, shape (samples, rows of a sample, ...)
        Further axes are checked against the output later, see `targets.one_hot`.

    Raises
    ------
    DataError
        If they are not classes, too many or too few, or a file has no label or several.
    """
    if isinstance(labels, Mapping):
        return _by_name(labels, dataset)
    array = _whole_numbers(labels)
    rows = dataset.rows or 1
    known = dataset.source_samples
    if len(array) // rows != known or len(array) < known * rows:
        raise DataError(
            f"{option_name('labels')}: are {len(array)}, the data has {known * rows} samples; give "
            "one for each"
        )
    grouped = array[: known * rows].reshape(known, rows, *array.shape[1:])
    aligned: NDArray[np.int64] = grouped[list(dataset.positions)]
    return aligned


def labels_of_batches(
    labels: NDArray[np.int64], groups: Iterable[tuple[int, ...]]
) -> list[NDArray[np.int64]]:
    """Labels of each batch of samples, shape (rows, ...), from those of all samples."""
    return [labels[list(group)].reshape(-1, *labels.shape[2:]) for group in groups]


def _whole_numbers(labels: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """Labels of any type and shape as integers.

    Raises
    ------
    DataError
        If one is neither a non-negative whole number nor `IGNORED`; names the sample.
    """
    try:
        array = np.asarray(labels)
    except ValueError as error:
        raise DataError(
            f"{option_name('labels')}: differ in length from sample to sample; fill them up to one "
            f"length with {IGNORED}, which does not count"
        ) from error
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise DataError(
            f"{option_name('labels')}: have shape {list(array.shape)} and type {array.dtype}; give "
            "one whole number from 0 for each sample, or each position of its output"
        )
    wrong = np.argwhere((~(array >= 0) & (array != IGNORED)) | (array != np.floor(array)))
    if len(wrong):
        place = tuple(int(index) for index in wrong[0])
        further = f" at {list(place[1:])}" if array.ndim > 1 else ""
        raise DataError(
            f"{option_name('labels')}: sample {place[0]} (from 0) has {array[place]:g}{further}; "
            f"give whole numbers from 0, or {IGNORED} for a position that does not count"
        )
    return array.astype(np.int64)


def _by_name(labels: Mapping[str, int], dataset: Dataset) -> NDArray[np.int64]:
    """Labels of files: by path relative to the data, by a longer path, or by the end of a path.

    An end, such as the bare name, must not match two files.
    """
    if not dataset.names:
        raise DataError(
            f"{option_name('labels')}: go by file name, but the data is not a folder of images; "
            "give them in the order of the samples, or by their numbers from 0"
        )
    by_end: dict[str, list[_Key]] = {}
    for key in labels:
        parts = _parts(key)
        by_end.setdefault(parts[-1] if parts else "", []).append((parts, key))
    folder = _parts(str(Path(dataset.source).resolve()))
    meant = {
        name: _meant(_parts(name), folder, by_end.get(Path(name).name, ()))
        for name in dataset.source_names
    }
    owners: dict[str, str] = {}
    for name, keys in meant.items():
        for key in keys:
            other = owners.setdefault(key, name)
            if other != name:
                raise DataError(
                    f"{option_name('labels')}: {quoted(key)} is {quoted(other)} as well as "
                    f"{quoted(name)}; give paths relative to the data folder"
                )
    return np.array([[_label(name, labels, meant[name])] for name in dataset.names], np.int64)


def _meant(name: tuple[str, ...], folder: tuple[str, ...], keys: Sequence[_Key]) -> tuple[str, ...]:
    """Among keys with the same last part, the best match for a file.

    That is its path relative to the folder; else the longest end of its full path; else longer
    paths that end in its path.
    """
    full = (*folder, *name)
    ends = [(its, key) for its, key in keys if full[-len(its) :] == its]
    best = max(ends, key=lambda end: (end[0] == name, len(end[0])), default=None)
    if best is not None:
        return tuple(key for its, key in ends if its == best[0])
    return tuple(key for its, key in keys if its[-len(name) :] == name)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(
        part for part in path.strip().replace("\\", "/").split("/") if part not in ("", ".")
    )


def _label(name: str, labels: Mapping[str, int], keys: Sequence[str]) -> int:
    if not keys:
        raise DataError(f"{option_name('labels')}: there is none for {quoted(name)}; add it")
    found = {int(_whole_numbers([labels[key]])[0]) for key in keys}
    if len(found) > 1:
        raise DataError(
            f"{option_name('labels')}: {quoted(name)} may be {quoted(keys[0])} or "
            f"{quoted(keys[1])}, which have different classes; give paths relative to the data "
            "folder"
        )
    return found.pop()
