"""What is called is what was meant."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from scipy.linalg import cython_lapack

from cobla_onnx.runtime.lapack import DSTERF, call, routine


def test_a_routine_with_other_arguments_is_refused():
    with pytest.raises(ImportError, match=r"dsytrd of LAPACK .*void \(char \*.*earlier version"):
        routine("dsytrd", "cididddiii")


@pytest.mark.parametrize("integer", ["blas_int", "npy_int64", "long"])
def test_a_routine_with_other_integers_is_refused(monkeypatch, integer):
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    title = f"void ({integer} *, my_d *, my_d *, {integer} *)".encode()
    monkeypatch.setitem(cython_lapack.__pyx_capi__, "dsterf", new(1, title, None))
    with pytest.raises(ImportError, match=f"dsterf of LAPACK .*{integer}"):
        routine("dsterf", "iddi")


def test_what_a_routine_refuses_is_an_error():
    with pytest.raises(np.linalg.LinAlgError, match="info -1"):
        call(DSTERF, -1, np.zeros(1), np.zeros(1))
