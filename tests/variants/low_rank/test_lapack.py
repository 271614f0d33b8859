"""What is called is what was meant."""

from __future__ import annotations

import numpy as np
import pytest

from cobla_onnx.variants.low_rank.lapack import DSTERF, call, routine


def test_a_routine_with_other_arguments_is_refused():
    with pytest.raises(ImportError, match=r"dsytrd of LAPACK .*void \(char \*.*earlier version"):
        routine("dsytrd", "cididddiii")


def test_what_a_routine_refuses_is_an_error():
    with pytest.raises(np.linalg.LinAlgError, match="info -1"):
        call(DSTERF, -1, np.zeros(1), np.zeros(1))
