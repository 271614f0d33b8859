"""Cross-fitting: the loss of a plan on all samples, each under factors made without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cobla_onnx.allocation.problem import Float64
from cobla_onnx.calibration.evaluation.probe import Probe
from cobla_onnx.calibration.statistics import Approximation, Seen
from cobla_onnx.graph.layers import Layer
from cobla_onnx.pipeline.search.finishing import Approximate, Finisher
from cobla_onnx.plan import Plan
from cobla_onnx.runtime.session import Feeds
from cobla_onnx.variants.low_rank.matricisation import Scheme

__all__ = ["CrossFit"]


@dataclass
class CrossFit:
    """The halves of the calibration split, each judged under the factors of the other.

    After Chernozhukov et al. 2018, Double/debiased machine learning, definition 3.1. The
    held-back samples are judged under the factors of the whole calibration split. A layer's
    statistics on each half are collected when a plan first factorises it, and kept for later plans.

    Parameters
    ----------
    finisher : Finisher
    """

    finisher: Finisher
    _seen: list[tuple[frozenset[str], Sequence[Seen]]] = field(default_factory=list)
    _probes: list[Probe] = field(default_factory=list)

    def by(self, finisher: Finisher) -> CrossFit:
        """Return it for another budget: statistics of the halves depend on the layers alone."""
        return replace(self, finisher=finisher)

    @property
    def halves(self) -> tuple[Sequence[int], Sequence[int]]:
        """Samples of the calibration split at even places, and at odd places."""
        made = self.finisher.dataset.calibration
        return made[::2], made[1::2]

    def losses(self, plan: Plan) -> Float64:
        """Loss that decisions follow, for each sample: the held-back samples, then both halves.

        Before refit.
        """
        found = [self.finisher.held_back(plan)]
        # Sessions hold the memory of their largest run: one is open at a time.
        self.finisher.judge.followed.rest()
        self._see({d.layer for d in plan.decisions if d.scheme is not None})
        if not self._probes:
            for half in self.halves:
                self._probes.append(self.finisher.judge.on(half))
                self._probes[-1].rest()
        for number, probe in enumerate(self._probes):
            found.append(probe.losses(self.finisher.weights(plan, self._of_half(1 - number))))
            probe.rest()
        return np.concatenate(found)

    def _see(self, names: set[str]) -> None:
        missing = names.difference(*(known for known, _ in self._seen))
        layers = [layer for layer in self.finisher.analysis.layers if layer.name in missing]
        if layers:
            seen = [self._seen_in(layers, half) for half in self.halves]
            self._seen.append((frozenset(missing), seen))

    def _seen_in(self, layers: Sequence[Layer], half: Sequence[int]) -> Seen:
        def batches() -> Iterable[Feeds]:
            return self.finisher.judge.batches(half)

        assert self.finisher.analysis.seen is not None
        return self.finisher.analysis.seen.in_others(layers, batches)

    def _of_half(self, number: int) -> Approximate:
        def approximate(layer: Layer, scheme: Scheme, ranks: Sequence[int]) -> list[Approximation]:
            halves = next(halves for names, halves in self._seen if layer.name in names)
            return halves[number].approximate(layer, scheme, ranks)

        return approximate
