"""Warn where calibration samples are too few, or too alike, to base decisions on."""

from __future__ import annotations

import numpy as np

from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.positions import sample_seeds

__all__ = ["FEW", "lack_of_evidence"]

# This many different samples carry almost no information.
FEW = 3


def lack_of_evidence(dataset: Dataset) -> tuple[str, ...]:
    """Return a note where the dataset has hardly any different samples, else none."""
    different: set[tuple[int, ...]] = set()
    zeros = True
    for feeds in dataset.batches((*dataset.calibration, *dataset.selection), 1):
        different.add(sample_seeds(feeds))
        if len(different) > FEW:
            return ()
        zeros = zeros and not any(np.any(array) for array in feeds.values())
    if zeros:
        what = "all samples are zeros"
    elif len(different) == 1:
        what = "all samples are the same"
    else:
        what = f"there are only {len(different)} different samples"
    return (
        f"{what}: that is too little to judge by, and no loss or error here says anything "
        "about other data; give more data",
    )
