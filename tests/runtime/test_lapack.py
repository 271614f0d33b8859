"""What is called is what was meant."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from scipy.linalg import cython_lapack

from cobla_onnx.runtime.lapack import DSTERF, add_gram, call, routine


def test_a_routine_with_other_arguments_is_refused():
    with pytest.raises(ImportError, match=r"dsytrd has .*void \(char \*.*earlier version"):
        routine("dsytrd", "cididddiii")


@pytest.mark.parametrize("integer", ["blas_int", "npy_int64", "long"])
def test_a_routine_with_other_integers_is_refused(monkeypatch, integer):
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    title = f"void ({integer} *, my_d *, my_d *, {integer} *)".encode()
    monkeypatch.setitem(cython_lapack.__pyx_capi__, "dsterf", new(1, title, None))
    with pytest.raises(ImportError, match=f"dsterf has .*{integer}"):
        routine("dsterf", "iddi")


def test_what_a_routine_refuses_is_an_error():
    with pytest.raises(np.linalg.LinAlgError, match="info -1"):
        call(DSTERF, -1, np.zeros(1), np.zeros(1))


@pytest.mark.parametrize(
    ("total", "rows"),
    [
        (np.zeros((3, 3)), np.zeros((3, 2), np.float32)),
        (np.zeros((2, 2)), np.zeros((3, 2))),
        (np.zeros((3, 6))[:, ::2], np.zeros((3, 2))),
        (np.zeros((3, 3)), np.zeros((2, 3)).T),
    ],
)
def test_what_would_be_written_elsewhere_is_refused(total, rows):
    with pytest.raises(ValueError, match=r"products of|strided"):
        add_gram(total, rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("size", "length"), [(5, 3), (3, 5), (1, 1), (0, 4), (4, 0)])
def test_products_of_rows_are_added_above_the_diagonal(size, length, dtype):
    rng = np.random.default_rng(0)
    rows, before = (rng.standard_normal((size, n)).astype(dtype) for n in (length, size))
    total = before.copy()
    add_gram(total, rows)
    np.testing.assert_allclose(np.triu(total), np.triu(before + rows @ rows.T), atol=1e-5)
    np.testing.assert_array_equal(np.tril(total, -1), np.tril(before, -1))
