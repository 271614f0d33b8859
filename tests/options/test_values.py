"""Values of options that are words or numbers."""

from __future__ import annotations

import pytest

from cobla_onnx.errors import UsageError
from cobla_onnx.options.values import memory_bytes


@pytest.mark.parametrize("limit", ["", "2 TB", "0", "-1GB", "9" * 5000])
def test_a_limit_of_memory_has_a_unit_that_is_known(limit: str) -> None:
    with pytest.raises(UsageError, match="is not a number of bytes"):
        memory_bytes(limit)
