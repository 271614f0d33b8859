"""Warn where calibration samples are too few, or too alike, to base decisions on."""

from __future__ import annotations

import numpy as np

from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.positions import sample_seeds

__all__ = ["FEW", "all_alike", "lack_of_evidence"]

# This many different samples carry almost no information.
FEW = 3


def all_alike(dataset: Dataset) -> str:
    """Say in what way all samples are the same, such as ``all samples are zeros``; else nothing."""
    return _likeness(*_different(dataset, 1))


def lack_of_evidence(dataset: Dataset) -> tuple[str, ...]:
    """Return a note where the dataset has hardly any different samples, else none."""
    different, zeros = _different(dataset, FEW)
    if different > FEW:
        return ()
    what = _likeness(different, zeros) or f"there are only {different} different samples"
    return (
        f"{what}: that is too little to judge by, and no loss or error here says anything "
        "about other data; give more data",
    )


def _likeness(different: int, zeros: bool) -> str:
    if different > 1:
        return ""
    return "all samples are zeros" if zeros else "all samples are the same"


def _different(dataset: Dataset, enough: int) -> tuple[int, bool]:
    """Count different samples, until there are more than `enough`; say if all were zeros."""
    different: set[tuple[int, ...]] = set()
    zeros = True
    for feeds in dataset.batches((*dataset.calibration, *dataset.selection), 1):
        different.add(sample_seeds(feeds))
        zeros = zeros and not any(np.any(array) for array in feeds.values())
        if len(different) > enough:
            break
    return len(different), zeros
