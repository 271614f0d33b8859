"""Loss of a probed model, and its gradient with respect to all layers' weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cobla_onnx.autodiff import GradientGraph, differentiate
from cobla_onnx.calibration.evaluation.probe import Pair, Probe, Weights
from cobla_onnx.runtime.session import Feeds, open_session, run_session

__all__ = ["GradientProbe"]

# Gradient graphs are made for fixed shapes; batches of further shapes are left out.
MOST_SHAPES = 4


@dataclass
class _Graph:
    """A gradient graph, opened."""

    session: onnxruntime.InferenceSession
    graph: GradientGraph


class GradientProbe:
    """Adds derivatives to a `Probe`, on its samples.

    Parameters
    ----------
    probe : Probe
    threads : int

    Attributes
    ----------
    blocked : dict of int to str
        Layers without a derivative, and why: the node that blocks it.
    left_out : int
        Number of batches left out of the gradient, because there are too many shapes.
    """

    def __init__(self, probe: Probe, threads: int) -> None:
        self._probe, self._threads = probe, threads
        self._graphs: dict[tuple[tuple[int, ...], ...], _Graph] = {}
        # Indices of the batches that are included.
        self._batches: list[int] = []
        self.blocked: dict[int, str] = {}
        self.left_out = 0
        for number, feeds in enumerate(probe.batches):
            if self._open(feeds) is None:
                self.left_out += 1
            else:
                self._batches.append(number)

    def loss(self, weights: Weights) -> float:
        """Mean loss over the samples."""
        return self._probe.loss(weights)

    def gradient(self, weights: Weights) -> list[Pair]:
        """Derivative of the mean loss with respect to every layer's weight and bias.

        Zero for blocked layers.
        """
        exposed = self._probe.exposed
        fixed = {name: _single(value) for name, value in self._probe.feeds(weights).items()}
        names = [n for pair in zip(exposed.weights, exposed.biases, strict=True) for n in pair if n]
        sums: dict[str, NDArray[Any]] = {
            name: np.zeros(np.shape(fixed[name]), np.float32) for name in names
        }
        samples = 0
        for number in self._batches:
            feeds, expected = self._probe.batches[number], self._probe.expected[number]
            opened = self._open(feeds)
            assert opened is not None
            graph = opened.graph
            inputs = {**{n: _single(v) for n, v in feeds.items()}, **fixed}
            for output, target in graph.targets.items():
                inputs[target] = _single(expected[output])
            for output, power in graph.powers.items():
                mean_square = np.square(expected[output].astype(np.float64)).mean()
                inputs[power] = np.asarray(mean_square, np.float32)
            values = run_session(opened.session, inputs)
            samples += len(values[graph.loss])
            for name, output in graph.gradients.items():
                sums[name] += values[output]
        return [
            (sums[weight] / samples, None if bias is None else sums[bias] / samples)
            for weight, bias in zip(exposed.weights, exposed.biases, strict=True)
        ]

    def _open(self, feeds: Feeds) -> _Graph | None:
        """Return the graph for inputs of these shapes; None if there are too many shapes."""
        key = tuple(feeds[name].shape for name in sorted(feeds))
        if key not in self._graphs:
            if len(self._graphs) == MOST_SHAPES:
                return None
            self._graphs[key] = self._make(feeds)
        return self._graphs[key]

    def _make(self, feeds: Feeds) -> _Graph:
        exposed = self._probe.exposed
        fixed = {**self._probe.feeds({}), **feeds}
        names = [n for n in (*exposed.weights, *exposed.biases) if n is not None]
        graph = differentiate(
            exposed.model,
            self._probe.measures,
            names,
            input_shapes={name: value.shape for name, value in fixed.items()},
            threads=self._threads,
        )
        for name, reason in graph.blocked.items():
            places = exposed.weights if name in exposed.weights else exposed.biases
            self.blocked.setdefault(places.index(name), reason)
        session = open_session(graph.model, self._threads, optimized=True, part="gradients")
        return _Graph(session, graph)


def _single(value: NDArray[Any]) -> NDArray[Any]:
    """Cast floating values to the graph's single precision."""
    return value.astype(np.float32) if value.dtype.kind == "f" else value
