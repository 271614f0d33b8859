"""Options that would be ignored are refused, with what to add or to leave out."""

from __future__ import annotations

from typing import Any

import pytest

from cobla_onnx.calibration.data.images import ImageOptions
from cobla_onnx.errors import UsageError
from cobla_onnx.options import Settings
from cobla_onnx.options.combined import check_combined


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": "l.csv"}, "give data= too"),
        ({"outputs": ("y",)}, "give data= too"),
        ({"loss": "mse"}, "loss='mse': compares outputs on samples; give data= too"),
        ({"samples": 3}, "samples=3: are of the data; give data= too"),
        ({"images": ImageOptions(scale=1 / 255)}, "images: say how images become inputs"),
        ({"arithmetic": "int8"}, "give data= too"),
        ({"distil": 2}, "give data= too"),
        ({"time_limit": 3.0}, "time_limit=3: limits the search of objective='loss', and"),
        ({"data": "d.npz", "labels": "l.csv", "loss": "kl"}, "the loss is the cross-entropy"),
        ({"data": "d.npz", "time_limit": 3.0}, "give one of them too"),
        ({"profile": "p.json"}, "is of times"),
    ],
)
def test_what_would_be_ignored_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Settings(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"images": ImageOptions()},
        {"data": "d.npz", "labels": "l.csv", "loss": "ce"},
        {"data": "d.npz", "loss": "kl", "samples": 3},
        {"data": "d.npz", "objective": "loss", "time_limit": 3.0},
        {"data": "d.npz", "distil": 1, "time_limit": 3.0},
    ],
)
def test_what_has_what_it_needs_is_taken(options: dict[str, Any]) -> None:
    check_combined(Settings(**options))
