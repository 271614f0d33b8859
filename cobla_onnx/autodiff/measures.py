"""How one output is compared with the original's: the kind of loss and the axis it runs over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

__all__ = ["CLASSES", "KINDS", "TINY", "LossKind", "Measure", "as_measure"]

LossKind: TypeAlias = Literal[
    "probabilities",
    "logits",
    "mse",
    "either",
    "ce-probabilities",
    "ce-logits",
    "binary-probabilities",
    "binary-logits",
]
KINDS: tuple[LossKind, ...] = get_args(LossKind)
"""How an output can be compared with its target; `Measure` says what they mean."""

CLASSES = ("probabilities", "logits")
"""Kinds of outputs that are compared as class distributions, without labels."""

TINY = 1e-12
"""Probabilities and powers below count as this much."""


@dataclass(frozen=True)
class Measure:
    """How an output is compared with its target.

    With p the target and q the output, the loss of a sample is the mean over all positions,
    that is all axes but the first and `axis`, of

    * ``probabilities``, ``logits``: the Kullback-Leibler divergence along `axis`;
    * ``ce-probabilities``, ``ce-logits``: the cross-entropy along `axis`, to a target that is
      a distribution, or, for a position that does not count, all zeros;
    * ``binary-probabilities``, ``binary-logits``: the cross-entropy of one probability, or its
      logit, to a target of 0 or 1, or of -1 where it does not count; there is no `axis`;
    * ``mse``: ``sum_k scale_k (q_k - p_k)^2`` over the slices k along `axis`;
    * ``either``, for rows that may be classes or values: half of that, and half of the
      squared length of the centred row of differences, over `spread`.

    Attributes
    ----------
    kind : str
    axis : int or None
        Of the classes, or of the features; None where an output has one feature.
    scale : tuple of float, optional
        Of each slice: the reciprocal of its variance over all samples and positions of the
        original's output, over the number of slices that vary; 0 for those that do not.
        Without it ``mse`` is the mean square relative to the targets' of the batch.
    spread : float
        Variance of the centred rows of the original's output, summed over columns.
    mask : str, optional
        Input with axes (batch, sequence), 1 where the first two axes of the output count.
    suppressed : bool
        Whether the original's output is infinite at some fixed places.
    labelled : bool
        Whether the targets are labels that were given: then positions may not count.
    decided_by : str
        What tells that it is to be compared so, in words.
    """

    kind: LossKind
    axis: int | None = 1
    scale: tuple[float, ...] | None = None
    spread: float = 1.0
    mask: str | None = None
    suppressed: bool = False
    labelled: bool = False
    decided_by: str = ""

    @property
    def has_classes(self) -> bool:
        """Whether there are classes along `axis`, for certain."""
        return self.kind.removeprefix("ce-") in CLASSES

    @property
    def of_logits(self) -> bool:
        """Whether the output holds logits, and not probabilities."""
        return self.kind.endswith("logits")


def as_measure(measure: LossKind | Measure) -> Measure:
    """Return a kind that was given by its name as the measure with classes along axis 1."""
    if isinstance(measure, Measure):
        return measure
    return Measure(measure, None if measure == "mse" or measure.startswith("binary") else 1)
