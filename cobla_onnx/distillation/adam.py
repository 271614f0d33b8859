"""Adam: steps along a running mean of gradients, each number's over its running size."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cobla_onnx.distillation.parameters import Flat

__all__ = ["Adam"]

# Of the running mean of gradients and of their squares. The second is below the usual 0.999, whose
# memory of a thousand steps is longer than most runs here.
MEAN, SQUARE = 0.9, 0.99
# Keeps numbers whose gradient has been 0 where they are.
LEAST = 1e-20
# Beyond it the square of a derivative leaves the range of single precision.
MOST = 1e18


@dataclass
class Adam:
    """The optimiser of Kingma and Ba 2015 (arXiv 1412.6980, algorithm 1), in single precision.

    A rate is relative: a number changes in a step by about so much of its tensor's root mean
    square, whatever the units of the tensor and of the loss.

    Parameters
    ----------
    sizes : float32 array, shape (parameters,)
        Root mean square of the tensor of each number.
    """

    sizes: Flat
    _mean: Flat = field(init=False)
    _square: Flat = field(init=False)
    _steps: int = 0

    def __post_init__(self) -> None:
        self._mean, self._square = np.zeros_like(self.sizes), np.zeros_like(self.sizes)

    def step(self, gradient: Flat, rate: float) -> Flat:
        """Return what is to be added to the parameters."""
        self._steps += 1
        gradient = np.clip(gradient, -MOST, MOST)
        self._mean += (1 - MEAN) * (gradient - self._mean)
        self._square += (1 - SQUARE) * (np.square(gradient) - self._square)
        # Both means begin at 0, and would be too small at first.
        mean = self._mean / (1 - MEAN**self._steps)
        square = self._square / (1 - SQUARE**self._steps)
        return np.asarray(-rate * self.sizes * mean / (np.sqrt(square) + LEAST), np.float32)
