"""Evaluate a model's loss with replaced weights, from one open session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.calibration.evaluation.choosing import measures_of
from cobla_onnx.calibration.evaluation.loss import sample_losses
from cobla_onnx.calibration.evaluation.output_choice import LossName
from cobla_onnx.calibration.evaluation.targets import binary_targets, one_hot
from cobla_onnx.graph.layers import Layer, read_bias, read_weight
from cobla_onnx.graph.subgraph import expose
from cobla_onnx.runtime.session import Feeds, open_session, run_session
from cobla_onnx.runtime.temporary import Shelf

__all__ = ["KEPT_OUTPUTS", "Pair", "Probe", "Weights", "whole_weights"]

Pair: TypeAlias = "tuple[NDArray[Any], NDArray[Any] | None]"
"""A layer's weight and bias, or the derivatives; None for no bias, or an unchanged one."""

Weights: TypeAlias = Mapping[int, Pair]
"""Replaced weights and biases, by the index of the layer."""

# Most bytes of the original's outputs that are kept for comparison.
KEPT_OUTPUTS = 1 << 28
# Bytes of the layers' weights between which a session is opened for each set of weights, which are
# its constants: convolutions then keep their blocked layout, and take half the time. Smaller models
# run in less time than a session takes to open; of larger ones no further copy is made.
CONSTANT = 1 << 20, 1 << 28


def whole_weights(model: onnx.ModelProto, layers: Sequence[Layer]) -> list[Pair]:
    """Read the layers' own weights and biases; of weights inside of the model they are copies."""
    return [
        (np.ascontiguousarray(read_weight(model, layer)), read_bias(model, layer))
        for layer in layers
    ]


class Probe:
    """A model with its layers' weights as inputs, with samples and the original's outputs.

    Parameters
    ----------
    model : ModelProto
    layers : sequence of Layer
        Layers whose weights may be replaced.
    batches : iterable of dict
        Samples; as many are kept as `limit` bytes of inputs and outputs allow.
    loss : mapping of str to Measure, or {'auto', 'kl', 'mse', 'ce'}
        How outputs are compared; with a name, this is decided from the first batch.
    threads : int
    labels : sequence of int64 array, optional
        Labels of each batch, used in place of the original's most likely classes, see `one_hot`.
    whole : sequence of (array, array or None), optional
        The `whole_weights` of the layers, for several probes to share; otherwise they are read.

    Attributes
    ----------
    measures : dict of str to Measure
        How each output is compared.
    samples : int
        Number of samples measured.
    unchanged : float64 array, shape (samples,)
        Loss of every sample with the layers' own weights, from the runs that gave the targets.
    labelled : bool
        Whether the targets are given labels, not the original's classes.
    layers : sequence of Layer
    exposed : Exposed
        The model as it is run.
    batches, expected : sequence of dict
        Inputs and targets, batch by batch. Targets are the original's outputs or labels, and
        masks by the names of the inputs.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[Layer],
        batches: Iterable[Feeds],
        loss: LossName | Mapping[str, Measure],
        threads: int,
        limit: int = KEPT_OUTPUTS,
        labels: Sequence[NDArray[np.int64]] | None = None,
        whole: Sequence[Pair] | None = None,
    ) -> None:
        self.exposed = exposed = expose(model, layers, as_inputs=True)
        self.layers = layers
        self._names = list(zip(exposed.weights, exposed.biases, strict=True))
        self._original: Feeds = {}
        pairs = whole_weights(model, layers) if whole is None else whole
        for (weight, bias), (own, own_bias) in zip(self._names, pairs, strict=True):
            self._original[weight] = own
            if bias is not None and own_bias is not None:
                self._original[bias] = own_bias
        self._threads = threads
        self._session: onnxruntime.InferenceSession | None = None
        size = sum(array.nbytes for array in self._original.values())
        # The model whose weights are constants, where that is faster.
        self._bare = (
            expose(model, layers, as_inputs=False).model
            if CONSTANT[0] <= size <= CONSTANT[1]
            else None
        )
        self.batches, self.expected = Shelf(), Shelf()
        self.labelled = labels is not None
        self.unchanged = self._keep(batches, loss, limit, labels)
        self.samples = len(self.unchanged)

    def _keep(
        self,
        batches: Iterable[Feeds],
        loss: LossName | Mapping[str, Measure],
        limit: int,
        labels: Sequence[NDArray[np.int64]] | None,
    ) -> NDArray[np.float64]:
        """Keep inputs and targets of the samples; return their losses under the own weights."""
        run = self._with(self._original)
        losses = [np.zeros(0)]
        for number, feeds in enumerate(batches):
            outputs = run(feeds)
            if not self.expected:
                self.measures: dict[str, Measure] = (
                    measures_of(self.exposed.model, feeds, outputs, loss, self.labelled)
                    if isinstance(loss, str)
                    else dict(loss)
                )
            kept = self.targets(feeds, outputs, None if labels is None else labels[number])
            limit -= sum(value.nbytes for value in (*kept.values(), *feeds.values()))
            self.batches.append(feeds)
            self.expected.append(kept)
            losses.append(sample_losses(self.measures, kept, outputs))
            if limit < 0:
                break
        return np.concatenate(losses)

    def targets(
        self, feeds: Feeds, outputs: Feeds, labels: NDArray[np.int64] | None = None
    ) -> Feeds:
        """Return the targets of a batch, from the original's outputs and labels, if given."""
        kept = {name: outputs[name] for name in self.measures}
        for name, measure in self.measures.items():
            given = labels if measure.labelled else None
            if measure.kind.startswith("binary"):
                assert given is not None
                kept[name] = binary_targets(kept[name], given)
            elif measure.kind.startswith("ce"):
                kept[name] = one_hot(kept[name], given, measure.axis or 1)
            if measure.mask is not None:
                kept[measure.mask] = feeds[measure.mask]
        return kept

    def losses(self, weights: Weights) -> NDArray[np.float64]:
        """Loss of every sample with some layers' weights replaced.

        Parameters
        ----------
        weights : mapping of int to (array, array or None)
            Weight, of shape ``layer.shape``, and bias (None if unchanged).

        Returns
        -------
        float64 array, shape (samples,)
        """
        return self.losses_of(self.outputs(weights))

    def losses_of(self, outputs: Iterable[tuple[Feeds, Feeds]]) -> NDArray[np.float64]:
        """Loss of every sample, from the results of `outputs`."""
        return np.concatenate(
            [sample_losses(self.measures, expected, actual) for expected, actual in outputs]
        )

    @property
    def reopens(self) -> bool:
        """Whether a session is opened for each set of weights."""
        return self._bare is not None

    def loss_of(self, outputs: Iterable[Feeds]) -> float:
        """Mean loss of outputs of all batches that were made elsewhere."""
        return float(self.losses_of(zip(self.expected, outputs, strict=True)).mean())

    def outputs(self, weights: Weights) -> Iterator[tuple[Feeds, Feeds]]:
        """Run batch by batch; yield the targets (`expected`) and the outputs."""
        run = self._with(self.feeds(weights))
        for feeds, expected in zip(self.batches, self.expected, strict=True):
            yield expected, run(feeds)

    def _with(self, weights: Feeds) -> Callable[[Feeds], Feeds]:
        """Return what runs a batch with the given weights and biases of all layers."""
        if self._bare is not None:
            own = open_session(
                self._bare, self._threads, (), weights, optimized=True, part="the loss"
            )
            return partial(run_session, own)
        if self._session is None:
            self._session = open_session(
                self.exposed.model, self._threads, optimized=True, part="the loss"
            )
        session = self._session
        return lambda feeds: run_session(session, {**feeds, **weights})

    def rest(self) -> None:
        """Free the session's working memory until the next run."""
        self._session = None

    def feeds(self, weights: Weights) -> Feeds:
        """Return all layers' weights and biases as inputs of the exposed model."""
        result = dict(self._original)
        for index, pair in weights.items():
            result |= self.feeds_of(index, pair)
        return result

    def feeds_of(self, index: int, pair: Pair) -> Feeds:
        """Return one layer's weight and bias as inputs of the exposed model."""
        (weight, bias), (name, bias_name) = pair, self._names[index]
        # An overflow shows in the loss.
        with np.errstate(over="ignore"):
            result = {name: np.ascontiguousarray(weight, dtype=self._original[name].dtype)}
            if bias is not None and bias_name is not None:
                old = self._original[bias_name]
                result[bias_name] = np.ascontiguousarray(bias, old.dtype).reshape(old.shape)
        return result

    def loss(self, weights: Weights) -> float:
        """Mean of `losses`."""
        return float(self.losses(weights).mean())
