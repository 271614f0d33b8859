"""Routines of BLAS and LAPACK, as scipy offers them to compiled code.

Unlike its functions in Python these do not hold Python's lock, so that other threads go on. Arrays
are in C order: to these routines, rows of a matrix are its columns.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy.linalg import cython_blas, cython_lapack

__all__ = [
    "DORMTR",
    "DPOSV",
    "DSTEDC",
    "DSTERF",
    "DSYTRD",
    "add_gram",
    "call",
    "call_sized",
    "routine",
]

_TITLE = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_ADDRESS = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
# Of a type, by its last letter in C.
_LETTERS = str.maketrans("rt", "ci")


def routine(name: str, arguments: str) -> Callable[..., None]:
    """Return a routine as a function of addresses.

    Parameters
    ----------
    arguments : str
        A letter for the type of each: ``c`` (char), ``i`` (int), ``s`` (float) or ``d`` (double).

    Raises
    ------
    ImportError
        If scipy's has others.
    """
    known = cython_lapack.__pyx_capi__
    capsule = known[name] if name in known else cython_blas.__pyx_capi__[name]
    title = _TITLE(capsule)
    # As whole words: another integer would be read beyond its end.
    kinds = re.findall(r"\b(char|int|\w*_[ds]) \*", title.decode())
    if "".join(kind[-1] for kind in kinds).translate(_LETTERS) != arguments:
        raise ImportError(
            f"scipy {scipy.__version__}: {name} has other arguments than before, "
            f"{title.decode()}; install an earlier version of scipy"
        )
    types = [ctypes.c_void_p] * len(arguments)
    return ctypes.CFUNCTYPE(None, *types)(_ADDRESS(capsule, title))


DSYTRD = routine("dsytrd", "cididdddii")
DSTERF = routine("dsterf", "iddi")
DSTEDC = routine("dstedc", "cidddidiiii")
DORMTR = routine("dormtr", "ccciididdidii")
DPOSV = routine("dposv", "ciididii")
_SYRK = {
    np.dtype(np.float32): (routine("ssyrk", "cciississi"), ctypes.c_float(1)),
    np.dtype(np.float64): (routine("dsyrk", "cciiddiddi"), ctypes.c_double(1)),
}


def add_gram(total: NDArray[Any], rows: NDArray[Any]) -> None:
    """Add the products of all pairs of rows to a matrix, on and above its diagonal.

    numpy's own product is a matrix for itself, whose one half is copied from the other number by
    number, before it can be added.

    Parameters
    ----------
    total : float32 or float64 array, shape (size, size)
        In C order.
    rows : array of the same type, shape (size, length)
        In C order.

    Raises
    ------
    ValueError
        If they are not: nothing else would stop BLAS from writing elsewhere.
    """
    size, length = rows.shape
    if total.shape != (size, size) or total.dtype != rows.dtype:
        raise ValueError(f"{total.dtype} {total.shape} for products of {rows.dtype} {rows.shape}")
    if not (total.flags.c_contiguous and rows.flags.c_contiguous):
        raise ValueError("neither may be strided: BLAS reads and writes what lies side by side")
    if rows.size:
        run, one = _SYRK[rows.dtype]
        # What is above the diagonal of rows is below that of columns.
        _run(run, b"L", b"T", size, length, one, rows, length, one, total, size)


def call(routine: Callable[..., None], *arguments: Any) -> None:
    """Call a routine with arguments, each bytes, int or a contiguous array.

    Raises
    ------
    numpy.linalg.LinAlgError
        If it does not converge, or an argument is wrong.
    """
    info = ctypes.c_int()
    _run(routine, *arguments, info)
    if info.value:
        raise np.linalg.LinAlgError(f"LAPACK gave up (info {info.value})")


def call_sized(
    routine: Callable[..., None], *arguments: Any, integers: NDArray[np.int32] | None = None
) -> None:
    """Ask a routine for the size of its work space, its last argument, and call it with that.

    Parameters
    ----------
    integers : int32 array, optional
        Work space of integers, large enough, where the routine takes some.
    """
    beyond = () if integers is None else (integers, len(integers))
    wanted = np.zeros(1)
    call(routine, *arguments, wanted, -1, *beyond)
    work = np.empty(int(wanted[0]))
    call(routine, *arguments, work, len(work), *beyond)


def _run(routine: Callable[..., None], *arguments: Any) -> None:
    routine(*map(_passed, arguments))


def _passed(argument: Any) -> Any:
    if isinstance(argument, bytes):
        return ctypes.c_char_p(argument)
    if isinstance(argument, int):
        return ctypes.byref(ctypes.c_int(argument))
    if isinstance(argument, ctypes.c_int | ctypes.c_float | ctypes.c_double):
        return ctypes.byref(argument)
    return argument.ctypes.data_as(ctypes.c_void_p)
