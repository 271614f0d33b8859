"""Labels for calibration samples: with them the loss is the cross-entropy."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.dataset import Dataset
from cobla_onnx.errors import DataError, UsageError
from cobla_onnx.names import quoted

__all__ = ["Labels", "align_labels", "one_hot", "read_labels"]

Labels: TypeAlias = "Sequence[int] | NDArray[Any] | Mapping[str, int]"
"""Classes in the order of the samples, or by file name where they are files."""

NAMES = ("labels", "label", "y")


def read_labels(path: Path) -> Labels:
    """Read labels from a file.

    Parameters
    ----------
    path : Path
        An ``.npy`` file, an ``.npz`` file with one array, or one called ``labels``,
        ``label`` or ``y``, or a ``.csv`` file with a class on each line, or a file name and
        a class; a first line without a number is a heading.

    Raises
    ------
    UsageError
        If there is no such file, or its ending is not known.
    DataError
        If it does not hold labels.
    """
    if not path.is_file():
        raise UsageError(f"--labels {path}: is no file; check the path")
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix not in (".npy", ".npz"):
        raise UsageError(f"--labels {path}: is neither .csv, .npy nor .npz; give one of these")
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content
        with content:
            named = [name for name in NAMES if name in content.files]
            chosen = named[0] if named else content.files[0] if len(content.files) == 1 else None
            if chosen is None:
                raise DataError(f"{path}: has no array called {' or '.join(map(repr, NAMES))}")
            labels: NDArray[Any] = content[chosen]
            return labels
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path}: holds no numbers that numpy reads; save it again") from error


def _read_csv(path: Path) -> Labels:
    try:
        rows = [row for row in csv.reader(path.read_text().splitlines()) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: is no text of comma-separated values; save it again") from error
    if rows and not _is_class(rows[0][-1]):
        rows = rows[1:]
    widths = {len(row) for row in rows}
    wrong = next((row for row in rows if not _is_class(row[-1])), None)
    if not rows or wrong is not None or widths - {1, 2} or len(widths) > 1:
        shown = "" if wrong is None else f", and not {quoted(','.join(wrong))}"
        raise DataError(
            f"{path}: needs a class, a whole number from 0, on each line, or a file name and a "
            f"class{shown}; write it so"
        )
    if widths == {1}:
        return np.array([int(row[0]) for row in rows])
    return {Path(row[0].strip()).name: int(row[1]) for row in rows}


def _is_class(text: str) -> bool:
    return text.strip().isdecimal()


def align_labels(labels: Labels, dataset: Dataset) -> NDArray[np.int64]:
    """Put labels in the order of a dataset's samples.

    Returns
    -------
    int64 array, shape (samples, rows of a sample)

    Raises
    ------
    DataError
        If they are not classes, too many or too few, or a file has none.
    """
    if isinstance(labels, Mapping):
        if not dataset.names:
            raise DataError(
                "--labels: are by file name, but the data is not a folder of images; give them "
                "in the order of the samples"
            )
        missing = [name for name in dataset.names if name not in labels]
        if missing:
            raise DataError(f"--labels: there is none for {quoted(missing[0])}; add it")
        return np.array([[labels[name]] for name in dataset.names], np.int64)
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.ndim != 1 or (array.size and array.min() < 0):
        raise DataError(
            f"--labels: have shape {list(array.shape)} and type {array.dtype}; give one whole "
            "number from 0 for each sample"
        )
    rows = dataset.rows or 1
    known = dataset.source_samples
    if len(array) // rows != known or len(array) < known * rows:
        raise DataError(
            f"--labels: are {len(array)}, the data has {known * rows} samples; give one for each"
        )
    grouped = array[: known * rows].reshape(known, rows).astype(np.int64)
    aligned: NDArray[np.int64] = grouped[list(dataset.positions)]
    return aligned


def one_hot(output: NDArray[Any], labels: NDArray[np.int64] | None, axis: int = 1) -> NDArray[Any]:
    """Return a distribution over the classes, along an axis, in the shape of an output.

    Parameters
    ----------
    output : array, shape (rows, ...)
        With classes along `axis`.
    labels : int64 array, shape (rows, ...), optional
        One for each position, that is the output's shape without `axis`. The output's own
        most likely classes where there are none.

    Raises
    ------
    DataError
        If there are too few labels, or the output has fewer classes than they say.
    """
    result = np.zeros_like(output)
    if labels is None:
        np.put_along_axis(result, output.argmax(axis=axis, keepdims=True), 1, axis=axis)
        return result
    classes = output.shape[axis]
    positions = output.shape[:axis] + output.shape[axis + 1 :]
    if len(labels) != len(output) or labels.size * classes != output.size:
        raise DataError(
            f"--labels: have shape {list(labels.shape)} for an output of shape "
            f"{list(output.shape)}; give one for each position of the output"
        )
    if labels.max() >= classes:
        raise DataError(
            f"--labels: hold class {labels.max()}, the model has {classes}, counted from "
            "0; check which classes the model was trained on"
        )
    chosen = np.expand_dims(labels.reshape(positions), axis)
    np.put_along_axis(result, chosen, 1, axis=axis)
    return result


def binary_targets(output: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[Any]:
    """Return labels of 0 and 1 in the shape of an output with one probability for each row.

    Raises
    ------
    DataError
        If there are others, or too few.
    """
    if labels.size != output.size:
        raise DataError(
            f"--labels: have shape {list(labels.shape)} for an output of shape "
            f"{list(output.shape)}; give one for each row of the output"
        )
    if labels.max(initial=0) > 1:
        raise DataError(
            f"--labels: hold class {labels.max()}, but the output has one value for each row, "
            "which tells 0 from 1; give labels of 0 and 1"
        )
    return labels.reshape(output.shape).astype(output.dtype)
