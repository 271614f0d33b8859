"""Gradient graphs of one model, opened for the shapes of the batches that they are run on."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from cobla_onnx.autodiff import GradientGraph, differentiate
from cobla_onnx.autodiff.measures import Measure
from cobla_onnx.runtime.session import Feeds, open_session, run_session

__all__ = ["Differentiated", "GradientSessions", "as_single"]

# Gradient graphs are made for fixed shapes; batches of further shapes are left out.
MOST_SHAPES = 4


class Differentiated(NamedTuple):
    """Loss of each sample of a batch, and the derivatives of their sum by the tensors' names."""

    losses: NDArray[Any]
    gradients: dict[str, NDArray[Any]]


@dataclass
class _Graph:
    """A gradient graph, opened."""

    session: onnxruntime.InferenceSession
    graph: GradientGraph


class GradientSessions:
    """Computes a model's loss and its derivatives with respect to some tensors.

    Parameters
    ----------
    model : ModelProto
    measures : mapping of str to Measure
        How each output is compared.
    names : sequence of str
        Tensors that the derivatives are of; they become inputs.
    threads : int

    Attributes
    ----------
    blocked : dict of str to str
        Tensors without a derivative, and why: the node that blocks it.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        measures: Mapping[str, Measure],
        names: Sequence[str],
        threads: int,
    ) -> None:
        self._model, self._measures, self._names = model, measures, names
        self._threads = threads
        self._opening = threading.Lock()
        self._graphs: dict[tuple[tuple[int, ...], ...], _Graph] = {}
        self.blocked: dict[str, str] = {}

    def open(self, feeds: Feeds, values: Mapping[str, NDArray[Any]]) -> bool:
        """Open the graph for inputs of these shapes; return whether there are not too many yet.

        Several threads may.

        Parameters
        ----------
        feeds : dict
            A batch.
        values : mapping of str to array
            Further inputs of the model, whose shapes never change.

        Raises
        ------
        ModelError
            If there is no such graph.
        """
        key = _key(feeds)
        with self._opening:
            if key not in self._graphs:
                if len(self._graphs) == MOST_SHAPES:
                    return False
                self._graphs[key] = self._make({**values, **feeds})
        return True

    def run(
        self, feeds: Feeds, expected: Feeds, values: Mapping[str, NDArray[Any]]
    ) -> Differentiated:
        """Differentiate the loss of a batch whose graph is open.

        Parameters
        ----------
        expected : dict
            Targets, by the names of the outputs.
        values : mapping of str to array
            The tensors that the derivatives are of, in single precision, and further inputs.
        """
        opened = self._graphs[_key(feeds)]
        graph = opened.graph
        inputs = {**{name: as_single(value) for name, value in feeds.items()}, **values}
        for output, target in graph.targets.items():
            inputs[target] = as_single(expected[output])
        for output, power in graph.powers.items():
            # Relative to infinity no loss is finite, and nothing is learned of it.
            with np.errstate(over="ignore"):
                inputs[power] = np.asarray(_mean_square(expected[output]), np.float32)
        found = run_session(opened.session, inputs)
        gradients = {name: found[output] for name, output in graph.gradients.items()}
        return Differentiated(found[graph.loss], gradients)

    def _make(self, inputs: Feeds) -> _Graph:
        graph = differentiate(
            self._model,
            self._measures,
            self._names,
            input_shapes={name: value.shape for name, value in inputs.items()},
            threads=self._threads,
        )
        self.blocked.update(graph.blocked)
        session = open_session(graph.model, self._threads, optimized=True, part="gradients")
        return _Graph(session, graph)


def as_single(value: NDArray[Any]) -> NDArray[Any]:
    """Cast floating values to the graph's single precision."""
    return value.astype(np.float32, copy=False) if value.dtype.kind == "f" else value


def _mean_square(array: NDArray[Any]) -> float:
    flat = array.reshape(-1)
    # Summed in double precision, without a copy in it.
    total = np.einsum("i,i", flat, flat, dtype=np.float64, casting="unsafe")
    return float(total) / max(1, flat.size)


def _key(feeds: Feeds) -> tuple[tuple[int, ...], ...]:
    return tuple(feeds[name].shape for name in sorted(feeds))
