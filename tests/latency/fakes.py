"""A stopwatch that does not look at a clock."""

from __future__ import annotations

import numpy as np

from cobla_onnx.graph.macs import fixed_input_shapes, infer_shapes, node_macs
from cobla_onnx.latency.timing import Stopwatch


class FakeStopwatch(Stopwatch):
    """Takes a nanosecond for each MAC, and some for each node.

    Attributes
    ----------
    overhead : float
        Nanoseconds for each node of a whole model.
    efficiency : float
        Share of the MACs that are saved which a whole model gains by them; a layer alone
        gains all.
    bend : float
        Power of the share of MACs saved that the share of time saved grows with.
    noise : float
        Relative, the same for all models of a round.
    """

    def __init__(
        self,
        threads=1,
        *,
        overhead=2000.0,
        efficiency=1.0,
        bend=1.0,
        noise=0.0,
        whole=None,
        drift=0.0,
    ):
        super().__init__(threads)
        self.overhead, self.efficiency, self.noise = overhead, efficiency, noise
        self.whole, self.drift, self.bend = whole, drift, bend
        self.calls = 0
        self.measured = 0

    def nanoseconds(self, model):
        known = fixed_input_shapes(model, {})
        macs, unknown = node_macs(model, infer_shapes(model, known))
        assert not unknown
        total = sum(macs.values())
        if len(model.graph.node) <= 2:
            return total + self.overhead
        if self.whole is not None:
            saved = max(1 - total / self.whole, 0) ** self.bend
            total = self.whole * (1 - self.efficiency * saved)
        return total + self.overhead * 4

    def times(self, models, feeds, *, seconds, least, most):
        self.calls += 1
        self.measured += len(models)
        row = np.array([self.nanoseconds(model) for model in models])
        generator = np.random.default_rng(self.calls)
        speed = 1 + self.noise * generator.standard_normal((least, 1))
        return 1e-9 * row * np.abs(speed) * (1 + self.drift * self.calls)
