"""What a compressed model is worth to its user: accuracy, agreement, or relative error.

The loss that ranks are chosen by is smooth and sums over classes; this is the number that
people ask for. It is measured on samples that no factor has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from cobla_onnx.autodiff.losses import TINY
from cobla_onnx.calibration.probe import Probe
from cobla_onnx.runtime import Feeds

__all__ = ["Quality", "measure_quality"]


@dataclass(frozen=True)
class Quality:
    """How much of the original's quality is left.

    Attributes
    ----------
    measure : {'accuracy', 'agreement', 'relative error'}
        ``accuracy``: share of rows whose most likely class is the label. ``agreement``:
        share whose most likely class is the original's. ``relative error``: norm of the
        difference of outputs over the norm of the original's. Of several outputs the worst.
    before, after : float
        Of the original and of the compressed model.
    drop : float
        What is lost: the fall of accuracy or agreement, or the error itself.
    samples : int
        Samples that it was measured on.
    """

    measure: str
    before: float
    after: float
    drop: float
    samples: int


def measure_quality(probe: Probe, outputs: Iterable[tuple[Feeds, Feeds]]) -> Quality:
    """Measure a compressed model on the samples of a probe.

    Parameters
    ----------
    probe : Probe
    outputs : iterable of (dict, dict)
        What `Probe.outputs` gives for the compressed model.
    """
    drops = _drops(probe, outputs)
    if probe.labelled:
        before, after = (min(d.values()) for d in (_drops(probe, probe.outputs({})), drops))
        return Quality("accuracy", 1.0 - before, 1.0 - after, after - before, probe.samples)
    worst = max(drops, key=lambda name: drops[name])
    drop = drops[worst]
    if probe.kinds[worst] == "mse":
        return Quality("relative error", 0.0, drop, drop, probe.samples)
    return Quality("agreement", 1.0, 1.0 - drop, drop, probe.samples)


def _drops(probe: Probe, outputs: Iterable[tuple[Feeds, Feeds]]) -> dict[str, float]:
    """Share of rows of another class than expected, or relative error, of every output."""
    wrong = dict.fromkeys(probe.kinds, 0.0)
    whole = dict.fromkeys(probe.kinds, 0.0)
    for expected, actual in outputs:
        for name, kind in probe.kinds.items():
            before, after = expected[name], actual[name]
            if kind == "mse":
                before, after = before.astype(np.float64), after.astype(np.float64)
                wrong[name] += float(np.square(before - after).sum())
                whole[name] += float(np.square(before).sum())
            else:
                other = before.argmax(axis=1) != after.argmax(axis=1)
                wrong[name] += float(other.sum())
                whole[name] += other.size
    return {
        name: math.sqrt(wrong[name] / max(whole[name], TINY))
        if kind == "mse"
        else wrong[name] / whole[name]
        for name, kind in probe.kinds.items()
    }
