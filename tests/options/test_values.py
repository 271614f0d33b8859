"""Values of options that are words or numbers."""

from __future__ import annotations

import pytest

from cobla_onnx.errors import UsageError
from cobla_onnx.options.values import check_batch, memory_bytes


@pytest.mark.parametrize("batch", [0, True, 1.5, "all"])
def test_a_batch_is_a_number_of_samples_or_auto(batch: object) -> None:
    check_batch("auto")
    check_batch(1)
    with pytest.raises(UsageError, match="give auto, or a whole number"):
        check_batch(batch)


@pytest.mark.parametrize("limit", ["", "2 TB", "0", "-1GB"])
def test_a_limit_of_memory_has_a_unit_that_is_known(limit: str) -> None:
    with pytest.raises(UsageError, match="is not a number of bytes"):
        memory_bytes(limit)
