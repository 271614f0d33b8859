"""Quality as a user sees it: accuracy, agreement with the original, or relative error.

The loss that chooses ranks is smooth and sums over classes; quality is the number that users ask
for. It is measured on samples that no factor has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import TINY, Measure
from cobla_onnx.calibration.evaluation.loss import counting, equal_infinities, squared_errors
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.runtime.session import Feeds

__all__ = ["Quality", "measure_quality"]


@dataclass(frozen=True)
class Quality:
    """How much of the original's quality is left.

    Attributes
    ----------
    measure : {'accuracy', 'agreement', 'relative error'}
        ``accuracy``: fraction of labelled rows, or positions, whose most likely class is the
        label. ``agreement``: fraction whose most likely class is the original's. ``relative
        error``: root of the mean over features of squared error over variance. The worst of
        several outputs, and of both readings of an output that may hold classes or values.
    before, after : float
        Quality of the original and of the compressed model.
    drop : float
        The loss of quality: the fall of accuracy or agreement, or the error itself.
    samples : int
        Number of samples on which it was measured.
    positions : int
        Number of positions that count: tokens, frames or pixels where an output has a class for
        each, else samples. 0 for relative error.
    output : str
        The output that was measured.
    undecided : bool
        Whether it is not known if that output holds classes or values.
    """

    measure: str
    before: float
    after: float
    drop: float
    samples: int
    output: str = ""
    undecided: bool = False
    positions: int = 0

    @property
    def counted(self) -> str:
        """Number of samples and positions, in words."""
        samples = f"{self.samples} held-back samples"
        if self.positions in (0, self.samples):
            return samples
        return f"{self.positions} positions in {samples}"


def measure_quality(probe: Probe, outputs: Iterable[tuple[Feeds, Feeds]]) -> Quality:
    """Measure a compressed model on the samples of a probe.

    Parameters
    ----------
    probe : Probe
    outputs : iterable of (dict, dict)
        Results of `Probe.outputs` for the compressed model.
    """
    after = _readings(probe, outputs)
    labelled = [name for name, measure in probe.measures.items() if measure.labelled]
    before = _readings(probe, probe.outputs({})) if labelled else {}
    found = []
    for (name, measure), (wrong, positions) in after.items():
        drop, first, last = wrong, 0.0, wrong
        if measure == "agreement":
            old = before[name, measure][0] if name in labelled else 0.0
            drop, first, last = wrong - old, 1.0 - old, 1.0 - wrong
        found.append(
            Quality(
                "accuracy" if name in labelled else measure,
                first,
                last,
                drop,
                probe.samples,
                name,
                positions=positions,
            )
        )
    worst = max(found, key=lambda quality: quality.drop)
    return replace(worst, undecided=probe.measures[worst.output].kind == "either")


def _readings(
    probe: Probe, outputs: Iterable[tuple[Feeds, Feeds]]
) -> dict[tuple[str, str], tuple[float, int]]:
    """Fraction of positions with a wrong class, and their number; or relative error."""
    wrong: dict[tuple[str, str], float] = {}
    whole: dict[tuple[str, str], float] = {}
    for expected, actual in outputs:
        for name, measure in probe.measures.items():
            mask = None if measure.mask is None else expected[measure.mask]
            for reading, values, weight in _measured(measure, expected[name], actual[name], mask):
                wrong[name, reading] = wrong.get((name, reading), 0.0) + values
                whole[name, reading] = whole.get((name, reading), 0.0) + weight
    return {
        key: (math.sqrt(value / max(whole[key], 1.0)), 0)
        if key[1] == "relative error"
        else (value / max(whole[key], 1.0), int(whole[key]))
        for key, value in wrong.items()
    }


def _measured(
    measure: Measure, before: NDArray[Any], after: NDArray[Any], mask: NDArray[Any] | None
) -> Iterator[tuple[str, float, float]]:
    """Sums over the positions of a batch, and their number, for each reading."""
    if before.shape != after.shape:
        yield "relative error", math.inf, 1.0
        return
    counts = counting(measure, before, mask)
    if measure.kind in ("mse", "either"):
        errors = squared_errors(measure, *equal_infinities(before, after, 0.0))
        if measure.scale is None:
            errors = errors / max(float(np.square(before, dtype=np.float64).mean()), TINY)
        yield ("relative error", *_total(errors, counts))
    if measure.kind.startswith("binary"):
        edge = 0.0 if measure.of_logits else 0.5
        yield ("agreement", *_total((before > 0.5) != (after > edge), counts))
    elif measure.kind != "mse":
        axis = measure.axis or 1
        other = before.argmax(axis=axis) != after.argmax(axis=axis)
        yield ("agreement", *_total(other, counts))


def _total(values: NDArray[Any], counts: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Sum and number of the positions that count."""
    if counts is None:
        return float(values.sum()), float(values.size)
    chosen = values[counts]
    return float(chosen.sum()), float(chosen.size)
