"""Convert arrays to the type of a model's input, and check them against its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.errors import DataError
from cobla_onnx.graph.first_axis import FirstAxis
from cobla_onnx.text import first_line

__all__ = ["InputSpec", "as_array", "check_shape", "converted"]


@dataclass(frozen=True)
class InputSpec:
    """An input of the graph that is not an initializer.

    Attributes
    ----------
    name : str
    dtype : numpy dtype
    shape : tuple of (int or None) or None
        None for an axis of any size; None instead of a tuple if the rank is not known.
    first : {'batch', 'other', 'unknown'}
        Meaning of the first axis, see `cobla_onnx.graph.first_axis`.
    given : tuple of int or None, optional
        Sizes given by the user, used for open axes that nothing else determines.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None
    first: FirstAxis = "batch"
    given: tuple[int | None, ...] | None = None

    @property
    def filled(self) -> tuple[int | None, ...] | None:
        """The shape with the given sizes filled in, except for the first axis."""
        if self.shape is None or self.given is None or len(self.given) != len(self.shape):
            return self.shape
        rest = zip(self.shape[1:], self.given[1:], strict=True)
        return (*self.shape[:1], *(new if known is None else known for known, new in rest))

    @property
    def shown(self) -> str:
        """The shape as messages show it, ``?`` for an axis of any size."""
        if self.shape is None:
            return "of any shape"
        return f"[{', '.join('?' if size is None else str(size) for size in self.shape)}]"


def as_array(value: Any, where: str) -> NDArray[Any]:
    """Return what is given for an input as an array.

    Raises
    ------
    DataError
        If it is none, such as lists of different lengths or a tensor on a GPU.
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{where}: is a {type(value).__name__} that cannot be read as an array "
            f"({first_line(error)}); give an array of numbers"
        ) from error


def converted(array: NDArray[Any], dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """Convert to the input's type, if no information is lost.

    Raises
    ------
    DataError
        If information would be lost, or a number is not finite.
    """
    if dtype.kind == "U":
        return _as_text(array, where)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where}: holds {array.dtype}, not numbers")
    if dtype.kind == "f":
        if array.dtype.kind != "f":
            raise DataError(
                f"{where}: is {array.dtype}, the model wants {dtype}; convert and normalise it "
                "as in training first"
            )
        if not np.isfinite(array).all():
            raise DataError(f"{where}: holds NaN or infinity; clean the data")
        if array.size and float(np.abs(array).max()) > float(np.finfo(dtype).max):
            raise DataError(f"{where}: its values overflow {dtype}; check the preprocessing")
        return array.astype(dtype, copy=False)
    if array.dtype.kind == "f" or (dtype.kind == "b") != (array.dtype.kind == "b"):
        raise DataError(f"{where}: is {array.dtype}, the model wants {dtype}; convert it first")
    converted = array.astype(dtype, copy=False)
    if not np.array_equal(converted, array):
        raise DataError(f"{where}: its values do not fit into {dtype}; convert it first")
    return converted


def _as_text(array: NDArray[Any], where: str) -> NDArray[Any]:
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: is not UTF-8 text; encode it again") from error
    texts = array.dtype.kind == "U" or all(isinstance(item, str) for item in array.ravel())
    if not texts:
        raise DataError(f"{where}: holds {array.dtype}, the model wants text; save strings")
    array = array.astype(str)
    # An array of empty strings takes no bytes, and could not be read back.
    return array if array.dtype.itemsize else array.astype("U1")


def check_shape(array: NDArray[Any], spec: InputSpec, rows: bool, where: str) -> None:
    """Check that an array fits an input; with `rows`, its first axis may have any size.

    Raises
    ------
    DataError
    """
    if spec.shape is None:
        return
    axes = range(1 if rows else 0, len(spec.shape))
    fits = array.ndim == len(spec.shape) and all(
        spec.shape[axis] in (None, array.shape[axis]) for axis in axes
    )
    if not fits:
        raise DataError(
            f"{where}: has shape {list(array.shape)}, the model wants {spec.shown}; "
            "check the data's layout"
        )
