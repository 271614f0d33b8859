"""Evaluate the loss with replaced weights, both as reported and as decisions follow it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.data.dataset import Dataset
from cobla_onnx.calibration.data.labels import labels_of_batches
from cobla_onnx.calibration.evaluation.choosing import Chooser, Compared, look_at
from cobla_onnx.calibration.evaluation.output_choice import LossName
from cobla_onnx.calibration.evaluation.parallel import SpreadProbe
from cobla_onnx.calibration.evaluation.probe import (
    Pair,
    Probe,
    Weights,
    whole_weights,
)
from cobla_onnx.calibration.evaluation.temperature import soften
from cobla_onnx.graph.layers import Layer
from cobla_onnx.runtime.cache import digest
from cobla_onnx.runtime.pool import Pool
from cobla_onnx.runtime.session import Feeds

__all__ = ["Judge"]


@dataclass
class Judge:
    """Probes of a model's loss on samples of a dataset.

    Decisions follow the loss itself, except for class distributions: there they follow the
    divergence at a temperature that suits the model (see `soften`), unless a loss is named.

    Parameters
    ----------
    model : ModelProto
    layers : sequence of Layer
        Layers whose weights are replaced.
    dataset : Dataset
    batch : int
        Batch size.
    loss : {'auto', 'kl', 'mse', 'ce'}
        Used if `compared` is not given.
    threads : int
    labels : int64 array, shape (samples, rows of a sample, ...), optional
        Labels of all samples of the dataset, as `align_labels` returns them.
    compared : Compared, optional
        How outputs are compared. If not given, the model is run on all samples to decide.

    Attributes
    ----------
    selection : Probe
        The loss itself, on the selection split.
    followed : Probe
        The loss that decisions follow, on the same split; `selection` if it is the same loss.
    follows : tuple of ModelProto and mapping of str to Measure
        The original with the outputs of the loss that decisions follow, and how they are compared.
    whole : sequence of (array, array or None)
        The layers' own weights and biases, which all probes share.
    """

    model: onnx.ModelProto
    layers: Sequence[Layer]
    dataset: Dataset
    batch: int
    loss: LossName
    threads: int
    labels: NDArray[np.int64] | None = None
    compared: Compared | None = None
    selection: Probe = field(init=False)
    followed: Probe = field(init=False)
    follows: tuple[onnx.ModelProto, Mapping[str, Measure]] = field(init=False)
    whole: Sequence[Pair] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.compared is None:
            chooser = Chooser.of(self.model, self.loss, labelled=self.labels is not None)
            self.compared = look_at(self.model, self.dataset, self.batch, self.threads, chooser)
        self.whole = whole_weights(self.model, self.layers)
        self.follows = self.model, self.measures
        self.selection = self.followed = self.on(self.dataset.selection)
        softened = self.softened(self.temperatures)
        if softened[0] is not self.model:
            self.follows = softened
            self.followed = self.on(self.dataset.selection)

    @property
    def measures(self) -> Mapping[str, Measure]:
        """How each output is compared."""
        assert self.compared is not None
        return self.compared.measures

    @property
    def temperatures(self) -> Mapping[str, float]:
        """Temperatures of class distributions, by the name of the output."""
        assert self.compared is not None
        return self.compared.temperatures

    def batches(self, indices: Sequence[int]) -> Iterable[Feeds]:
        """Return a fresh iterator over samples."""
        return self.dataset.batches(indices, self.batch)

    def labels_of(self, indices: Sequence[int]) -> list[NDArray[np.int64]] | None:
        """Labels of each batch of samples, shape (rows, ...), if there are any."""
        if self.labels is None:
            return None
        return labels_of_batches(self.labels, self.dataset.groups(indices, self.batch))

    def key(self, indices: Sequence[int]) -> str:
        """Hash what losses on samples depend on, apart from the model and the weights."""
        how = dict(self.measures), dict(self.temperatures), self.batch
        return digest(self.dataset.content(indices), self.labels_of(indices), how)

    def on(self, indices: Sequence[int]) -> Probe:
        """Open a probe of the loss that decisions follow."""
        model, loss = self.follows
        return self._probe(model, loss, self.batches(indices), self.labels_of(indices))

    def stated_on(self, indices: Sequence[int]) -> Probe:
        """Open a probe of the loss itself."""
        batches, labels = self.batches(indices), self.labels_of(indices)
        return self._probe(self.model, self.measures, batches, labels)

    def softened(
        self, temperatures: Mapping[str, float]
    ) -> tuple[onnx.ModelProto, Mapping[str, Measure]]:
        """Return the original with outputs at these temperatures, and how they are compared."""
        if all(value <= 1.0 for value in temperatures.values()):
            return self.model, self.measures
        return soften(self.model, self.measures, temperatures)

    def singly(
        self, indices: Sequence[int], model: onnx.ModelProto, loss: Mapping[str, Measure]
    ) -> Probe:
        """Open a probe of such a loss with each sample as a batch of its own, all of them.

        It runs on one thread: what is learned from its targets repeats on any number of them.
        """
        batches, labels = self.dataset.batches(indices, 1), None
        if self.labels is not None:
            labels = labels_of_batches(self.labels, self.dataset.groups(indices, 1))
        layers, whole = self.layers, self.whole
        return Probe(model, layers, batches, loss, 1, sys.maxsize, labels, whole)

    def _probe(
        self,
        model: onnx.ModelProto,
        loss: Mapping[str, Measure],
        batches: Iterable[Feeds],
        labels: Sequence[NDArray[np.int64]] | None,
    ) -> Probe:
        layers, whole = self.layers, self.whole
        return Probe(model, layers, batches, loss, self.threads, labels=labels, whole=whole)

    def spread_on(self, indices: Sequence[int], pool: Pool, apart: bool = False) -> SpreadProbe:
        """Open a probe of the loss that decisions follow, over a pool; see there."""
        model, loss = self.follows
        labels = self.labels_of(indices)
        return SpreadProbe(
            pool, model, self.layers, self.batches(indices), loss, labels, self.whole, apart
        )

    def scores(self, weights: Weights) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Losses on the selection split: the one that decisions follow, and the loss itself."""
        searched = self.followed.losses(weights)
        same = self.followed is self.selection
        return searched, searched if same else self.selection.losses(weights)
