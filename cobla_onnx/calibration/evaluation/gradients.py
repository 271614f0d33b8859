"""Loss of a probed model, and its gradient with respect to all layers' weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cobla_onnx.calibration.evaluation.gradient_sessions import GradientSessions, as_single
from cobla_onnx.calibration.evaluation.probe import Pair, Probe, Weights

__all__ = ["GradientProbe"]


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
        self._probe = probe
        exposed = probe.exposed
        self._names = [
            n for pair in zip(exposed.weights, exposed.biases, strict=True) for n in pair if n
        ]
        self._sessions = GradientSessions(exposed.model, probe.measures, self._names, threads)
        fixed = probe.feeds({})
        # Indices of the batches that are included.
        self._batches = [
            number
            for number, feeds in enumerate(probe.batches)
            if self._sessions.open(feeds, fixed)
        ]
        self.left_out = len(probe.batches) - len(self._batches)
        self.blocked: dict[int, str] = {}
        for name, reason in self._sessions.blocked.items():
            places = exposed.weights if name in exposed.weights else exposed.biases
            self.blocked.setdefault(places.index(name), reason)

    def loss(self, weights: Weights) -> float:
        """Mean loss over the samples."""
        return self._probe.loss(weights)

    def gradient(self, weights: Weights) -> list[Pair]:
        """Derivative of the mean loss with respect to every layer's weight and bias.

        Zero for blocked layers.
        """
        exposed = self._probe.exposed
        fixed = {name: as_single(value) for name, value in self._probe.feeds(weights).items()}
        sums: dict[str, NDArray[Any]] = {
            name: np.zeros(np.shape(fixed[name]), np.float32) for name in self._names
        }
        samples = 0
        for number in self._batches:
            feeds, expected = self._probe.batches[number], self._probe.expected[number]
            found = self._sessions.run(feeds, expected, fixed)
            samples += len(found.losses)
            for name, gradient in found.gradients.items():
                sums[name] += gradient
        return [
            (sums[weight] / samples, None if bias is None else sums[bias] / samples)
            for weight, bias in zip(exposed.weights, exposed.biases, strict=True)
        ]
