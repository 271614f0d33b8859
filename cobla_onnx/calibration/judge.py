"""The loss of a model with other weights: as it is stated, and as decisions follow it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.allocation.sequential import Scores
from cobla_onnx.cache import digest
from cobla_onnx.calibration.dataset import Dataset
from cobla_onnx.calibration.loss import LossKind, LossName
from cobla_onnx.calibration.probe import Probe, Weights
from cobla_onnx.calibration.soften import CLASSES, soften, temperatures
from cobla_onnx.calibration.spread import SpreadProbe
from cobla_onnx.graph.layers import Layer
from cobla_onnx.parallel import Pool
from cobla_onnx.runtime import Feeds, open_session, run_session

__all__ = ["Judge"]


@dataclass
class Judge:
    """Probes of a model's loss on samples of a dataset.

    Decisions follow the loss itself, but for class distributions their divergence at a
    temperature that suits the model, see `soften`, unless a loss is named.

    Parameters
    ----------
    model : ModelProto
    layers : sequence of Layer
        Those that get other weights.
    dataset : Dataset
    batch : int
        Samples that are run at a time.
    loss : {'auto', 'kl', 'mse', 'ce'}
    threads : int
    labels : int64 array, shape (samples, rows of a sample), optional
        Of all samples of the dataset; with them `loss` is ``ce``.

    Attributes
    ----------
    selection : Probe
        The loss itself, on the selection split.
    followed : Probe
        The loss that decisions follow, there; `selection` where it is the same.
    temperatures : dict of str to float
        By the name of the output; of class distributions only.
    """

    model: onnx.ModelProto
    layers: Sequence[Layer]
    dataset: Dataset
    batch: int
    loss: LossName
    threads: int
    labels: NDArray[np.int64] | None = None
    selection: Probe = field(init=False)
    followed: Probe = field(init=False)
    temperatures: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._follows: tuple[onnx.ModelProto, LossName | Mapping[str, LossKind]]
        self._follows = self.model, self.loss
        self.selection = self.followed = self.on(self.dataset.selection)
        kinds = self.selection.kinds
        if self.loss == "auto" and any(kind in CLASSES for kind in kinds.values()):
            # Of all samples: a fifth of them tells too little.
            outputs = chain(self.selection.expected, self._originals())
            self.temperatures = temperatures(kinds, outputs)
        if any(value > 1.0 for value in self.temperatures.values()):
            self._follows = soften(self.model, kinds, self.temperatures)
            self.followed = self.on(self.dataset.selection)

    def _originals(self) -> Iterator[Feeds]:
        """Outputs of the original on the calibration split, batch by batch."""
        session = open_session(self.model, self.threads, optimized=True, part="the loss")
        for feeds in self.batches(self.dataset.calibration):
            yield run_session(session, feeds)

    @property
    def kinds(self) -> Mapping[str, LossKind]:
        """How each output is compared."""
        return self.selection.kinds

    def batches(self, indices: Sequence[int]) -> Iterable[Feeds]:
        """Return a fresh iterator over samples."""
        return self.dataset.batches(indices, self.batch)

    def labels_of(self, indices: Sequence[int]) -> NDArray[np.int64] | None:
        """Labels of samples, if there are any."""
        return None if self.labels is None else self.labels[list(indices)]

    def key(self, indices: Sequence[int]) -> str:
        """Hash what losses on samples depend on beside the model and the weights."""
        how = self.loss, dict(self.kinds), self.temperatures, self.batch
        return digest(self.dataset.content(indices), self.labels_of(indices), how)

    def on(self, indices: Sequence[int]) -> Probe:
        """Open a probe of the loss that decisions follow."""
        model, loss = self._follows
        labels = self.labels_of(indices)
        return Probe(model, self.layers, self.batches(indices), loss, self.threads, labels=labels)

    def spread_on(self, indices: Sequence[int], pool: Pool) -> SpreadProbe:
        """Open a probe of the loss that decisions follow, over a pool."""
        model, loss = self._follows
        labels = self.labels_of(indices)
        return SpreadProbe(pool, model, self.layers, self.batches(indices), loss, labels)

    def scores(self, weights: Weights) -> Scores:
        """Losses on the selection split, both of them."""
        searched = self.followed.losses(weights)
        same = self.followed is self.selection
        return Scores(searched, searched if same else self.selection.losses(weights))
